//! What the types of per-CPU variables refuse. Each refusal stands beside a twin that is accepted and differs from it in
//! the one point, so that it is refused for no other reason.
//!
//! # A copy is shared only if it may be
//! A `&T` of any CPU's copy needs `T: Sync`.
//! ```compile_fail,E0277
//! let owner = pcpu::PerCpu::<std::cell::Cell<u8>>::new().unwrap();
//! owner.get(pcpu::unit::CpuId::new(0));
//! ```
//! ```
//! let owner = pcpu::PerCpu::<std::sync::atomic::AtomicU8>::new().unwrap();
//! owner.get(pcpu::unit::CpuId::new(0));
//! ```
//! The only user of an owner needs none.
//! ```
//! let mut owner = pcpu::PerCpu::<std::cell::Cell<u8>>::new().unwrap();
//! owner.get_mut(pcpu::unit::CpuId::new(0)).unwrap().set(1);
//! ```
//!
//! # An owner goes to another thread only if its copies may be dropped there
//! ```compile_fail,E0277
//! let owner = pcpu::PerCpu::<std::rc::Rc<u8>>::new_with(|_| std::rc::Rc::new(1)).unwrap();
//! std::thread::spawn(move || drop(owner));
//! ```
//! ```
//! let owner = pcpu::PerCpu::<std::sync::Arc<u8>>::new_with(|_| std::sync::Arc::new(1)).unwrap();
//! std::thread::spawn(move || drop(owner));
//! ```
//! And it is shared between threads only if its copies may be.
//! ```compile_fail,E0277
//! let owner = pcpu::PerCpu::<std::cell::Cell<u8>>::new().unwrap();
//! std::thread::scope(|scope| { scope.spawn(|| drop(&owner)); });
//! ```
//! ```
//! let owner = pcpu::PerCpu::<std::sync::atomic::AtomicU8>::new().unwrap();
//! std::thread::scope(|scope| { scope.spawn(|| { let _ = &owner; }); });
//! ```
//!
//! # Handles of two domains do not mix
//! ```compile_fail,E0308
//! fn of_two<A: pcpu::Domain, B: pcpu::Domain>(a: &pcpu::PerCpu<u8, A>) -> pcpu::PerCpuPtr<u8, B> {
//!     a.as_ptr()
//! }
//! ```
//! ```
//! fn of_one<A: pcpu::Domain>(a: &pcpu::PerCpu<u8, A>) -> pcpu::PerCpuPtr<u8, A> {
//!     a.as_ptr()
//! }
//! ```
//!
//! # A handle is not let go of unseen
//! Nobody could free its variable.
//! ```compile_fail
//! #![deny(unused_must_use)]
//! pcpu::alloc_percpu::<u64>().unwrap();
//! ```
//! ```
//! #![deny(unused_must_use)]
//! let variable = pcpu::alloc_percpu::<u64>().unwrap();
//! ```
//!
//! # A hook of findings can be asked by every CPU
//! ```compile_fail,E0277
//! use pcpu::hardened::{Finding, FindingHook, Hardening};
//! struct Count(std::cell::Cell<u32>);
//! impl FindingHook for Count {
//!     fn found(&self, _: &Finding) {}
//! }
//! ```
//! ```
//! use pcpu::hardened::{Finding, FindingHook, Hardening};
//! struct Count(std::sync::atomic::AtomicU32);
//! impl FindingHook for Count {
//!     fn found(&self, _: &Finding) {}
//! }
//! ```
//!
//! # A cell lends nobody its value
//! ```compile_fail,E0308
//! let owner = pcpu::PerCpu::<pcpu::CpuCell<u64>>::new().unwrap();
//! let value: &u64 = owner.get(pcpu::unit::CpuId::new(0)).unwrap();
//! ```
//! ```compile_fail,E0605
//! let owner = pcpu::PerCpu::<pcpu::CpuCell<u64>>::new().unwrap();
//! let value = owner.get(pcpu::unit::CpuId::new(0)).unwrap() as &std::sync::atomic::AtomicU64;
//! ```
//! ```
//! let owner = pcpu::PerCpu::<pcpu::CpuCell<u64>>::new().unwrap();
//! let value: &pcpu::CpuCell<u64> = owner.get(pcpu::unit::CpuId::new(0)).unwrap();
//! let value: u64 = value.read_remote();
//! ```
//! There is no writing to another CPU's copy.
//! ```compile_fail,E0599
//! use pcpu::LocalCell;
//! let owner = pcpu::PerCpu::<pcpu::CpuCell<u64>>::new().unwrap();
//! owner.get(pcpu::unit::CpuId::new(0)).unwrap().add(1);
//! ```
//! ```
//! use pcpu::LocalCell;
//! let owner = pcpu::PerCpu::<pcpu::CpuCell<u64>>::new().unwrap();
//! owner.add(1);
//! ```
//!
//! # Cells hold integers
//! ```compile_fail,E0599
//! let cell = pcpu::CpuCell::<f64>::new(0.0);
//! ```
//! ```compile_fail,E0599
//! let cell = pcpu::CpuCell::<String>::new(String::new());
//! ```
//! ```compile_fail,E0599
//! use pcpu::LocalCell;
//! pcpu::PerCpu::<pcpu::CpuCell<f64>>::new().unwrap().add(1.0);
//! ```
//! ```
//! use pcpu::LocalCell;
//! let cell = pcpu::CpuCell::<i16>::new(0);
//! pcpu::PerCpu::<pcpu::CpuCell<i16>>::new().unwrap().add(1);
//! ```
//!
//! # Zero bytes become only what they are a value of
//! ```compile_fail,E0277
//! let variable = pcpu::alloc_percpu::<&u8>();
//! ```
//! ```compile_fail,E0277
//! let variable = pcpu::PerCpu::<&u8>::new();
//! ```
//! ```compile_fail,E0277
//! let variable = pcpu::PerCpu::<[std::num::NonZeroU8]>::new_slice(4);
//! ```
//! ```
//! let variable = pcpu::alloc_percpu::<u8>();
//! let variable = pcpu::PerCpu::<Option<std::num::NonZeroU8>>::new();
//! let variable = pcpu::PerCpu::<[u8]>::new_slice(4);
//! static BYTE: u8 = 1;
//! let variable = pcpu::PerCpu::<&u8>::new_with(|_| &BYTE);
//! ```
//!
//! # A raw handle needs `unsafe`
//! ```compile_fail,E0599
//! use pcpu::LocalCell;
//! let owner = pcpu::PerCpu::<pcpu::CpuCell<u32>>::new().unwrap();
//! owner.as_ptr().add(1);
//! ```
//! ```compile_fail,E0133
//! let owner = pcpu::PerCpu::<pcpu::CpuCell<u32>>::new().unwrap();
//! pcpu::this_cpu::add(owner.as_ptr(), 1);
//! ```
//! ```
//! let owner = pcpu::PerCpu::<pcpu::CpuCell<u32>>::new().unwrap();
//! // SAFETY: the owner lives on.
//! unsafe { pcpu::this_cpu::add(owner.as_ptr(), 1) };
//! ```
//!
//! # Nothing outlives the owner
//! ```compile_fail,E0505
//! use pcpu::LocalCell;
//! let histogram = pcpu::PerCpu::<[pcpu::CpuCell<u32>]>::new_slice(4).unwrap();
//! let element = histogram.at(1);
//! drop(histogram);
//! element.add(1);
//! ```
//! ```
//! use pcpu::LocalCell;
//! let histogram = pcpu::PerCpu::<[pcpu::CpuCell<u32>]>::new_slice(4).unwrap();
//! let element = histogram.at(1);
//! element.add(1);
//! drop(histogram);
//! ```
//! ```compile_fail,E0597
//! use pcpu::LocalCell;
//! let copy = {
//!     let owner = pcpu::PerCpu::<pcpu::CpuCell<u32>>::new().unwrap();
//!     owner.get(pcpu::unit::CpuId::new(0)).unwrap()
//! };
//! copy.read_remote();
//! ```
//! ```
//! use pcpu::LocalCell;
//! let value = {
//!     let owner = pcpu::PerCpu::<pcpu::CpuCell<u32>>::new().unwrap();
//!     owner.get(pcpu::unit::CpuId::new(0)).unwrap().read_remote()
//! };
//! ```
//! Nor is it moved or lent mutably while a copy is lent.
//! ```compile_fail,E0505
//! let owner = pcpu::PerCpu::<pcpu::CpuCell<u32>>::new().unwrap();
//! let copies = owner.iter();
//! let moved = owner;
//! copies.count();
//! ```
//! ```compile_fail,E0502
//! let mut owner = pcpu::PerCpu::<pcpu::CpuCell<u32>>::new().unwrap();
//! let copies = owner.iter();
//! owner.iter_mut().count();
//! copies.count();
//! ```
//! ```
//! let mut owner = pcpu::PerCpu::<pcpu::CpuCell<u32>>::new().unwrap();
//! let copies = owner.iter();
//! copies.count();
//! owner.iter_mut().count();
//! let moved = owner;
//! ```
//!
//! # What goes from thread to thread by a CPU's copy may go
//! ```compile_fail,E0277
//! static LOCK: pcpu::CpuLock<std::cell::Cell<u8>> = pcpu::CpuLock::new(std::cell::Cell::new(0));
//! pcpu::define_per_cpu! { static NAMES: pcpu::CpuLock<Option<std::rc::Rc<u8>>> = pcpu::CpuLock::new(None); }
//! ```
//! ```
//! static LOCK: pcpu::CpuLock<std::cell::Cell<u8>> = pcpu::CpuLock::new(std::cell::Cell::new(0));
//! pcpu::define_per_cpu! { static NAMES: pcpu::CpuLock<Option<std::sync::Arc<u8>>> = pcpu::CpuLock::new(None); }
//! ```
//! ```compile_fail,E0277
//! struct Work { link: pcpu::Link, of_thread: std::rc::Rc<u8> }
//! pcpu::stack_node!(Work { link });
//! pcpu::define_per_cpu! { static QUEUE: pcpu::CpuStack<Box<Work>> = pcpu::CpuStack::new(); }
//! ```
//! ```
//! struct Work { link: pcpu::Link, of_thread: std::sync::Arc<u8> }
//! pcpu::stack_node!(Work { link });
//! pcpu::define_per_cpu! { static QUEUE: pcpu::CpuStack<Box<Work>> = pcpu::CpuStack::new(); }
//! ```
//! ```compile_fail,E0277
//! pcpu::define_per_cpu! { static ITEMS: pcpu::CpuBuffer<*const u8, 4> = pcpu::CpuBuffer::new(); }
//! ```
//! ```
//! pcpu::define_per_cpu! { static ITEMS: pcpu::CpuBuffer<usize, 4> = pcpu::CpuBuffer::new(); }
//! ```
//! A node is given to a stack, and no pointer to it is kept.
//! ```compile_fail,E0382
//! use pcpu::LocalStack;
//! struct Work { link: pcpu::Link }
//! pcpu::stack_node!(Work { link });
//! let stack = pcpu::PerCpu::<pcpu::CpuStack<Box<Work>>>::new().unwrap();
//! let work = Box::new(Work { link: pcpu::Link::new() });
//! stack.push(work);
//! stack.push(work);
//! ```
//! ```compile_fail,E0277
//! struct Work { link: pcpu::Link }
//! pcpu::stack_node!(Work { link });
//! let stack = pcpu::PerCpu::<pcpu::CpuStack<std::sync::Arc<Work>>>::new().unwrap();
//! ```
//! A stack of nodes that live for long is no stack of nodes that live shorter: one could be pushed.
//! ```compile_fail
//! struct Work<'a> { link: pcpu::Link, name: &'a str }
//! // SAFETY: the link lies there.
//! unsafe impl pcpu::Node for Work<'_> {
//!     const LINK_OFFSET_BYTES: usize = std::mem::offset_of!(Work<'static>, link);
//! }
//! fn shorter<'a>(stack: pcpu::CpuStack<Box<Work<'static>>>) -> pcpu::CpuStack<Box<Work<'a>>> { stack }
//! ```
//! ```
//! struct Work<'a> { link: pcpu::Link, name: &'a str }
//! // SAFETY: the link lies there.
//! unsafe impl pcpu::Node for Work<'_> {
//!     const LINK_OFFSET_BYTES: usize = std::mem::offset_of!(Work<'static>, link);
//! }
//! fn same<'a>(stack: pcpu::CpuStack<Box<Work<'a>>>) -> pcpu::CpuStack<Box<Work<'a>>> { stack }
//! ```
//! What a lock lends does not leave the closure.
//! ```compile_fail
//! use pcpu::LocalLock;
//! let lock = pcpu::PerCpu::<pcpu::CpuLock<u8>>::new().unwrap();
//! let value: &mut u8 = lock.with(|value| value);
//! ```
//! ```
//! use pcpu::LocalLock;
//! let lock = pcpu::PerCpu::<pcpu::CpuLock<u8>>::new().unwrap();
//! let value: u8 = lock.with(|value| *value);
//! ```
