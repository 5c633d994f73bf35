//! Stacks of nodes that hold their own links, one on every CPU: lists of free buffers, of finished work.
//!
//! A copy is one word, the first node's link; a link is the address of the next one. What always holds:
//! - a node on a stack is owned by the stack: whoever pushed it gave the only pointer to it away, and whoever pops it
//!   gets that pointer;
//! - the links on a stack form a chain that ends with 0, so a copy of zero bytes is an empty stack.
//!
//! To look into the first node while popping it is safe although the node may be freed by whoever takes it: on the
//! CPU itself nobody can take it within the operation, and other CPUs never take nodes of this one.

use core::cell::UnsafeCell;
use core::fmt;
use core::iter::FusedIterator;
use core::marker::PhantomData;
use core::mem;
use core::ptr::{self, NonNull};
use core::sync::atomic::{Ordering, fence};

use zerocopy::FromZeros;

use super::{Change, Live, LocalOps};
use crate::alloc_api::{Domain, PerCpuPtr};

/// The place in a node by which it hangs on a stack.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct Link(UnsafeCell<usize>);

// SAFETY: only the owner of a node and the stack that it is on touch the link, and there is one of both at a time.
unsafe impl Sync for Link {}

impl Link {
    /// A link of a node that is on no stack.
    pub const fn new() -> Self {
        Self(UnsafeCell::new(0))
    }
}

/// A type with a [`Link`]: what [`stack_node!`](crate::stack_node) makes of a struct.
///
/// # Safety
/// A `Link` lies so many bytes into every value, and is used by stacks only.
pub unsafe trait Node {
    /// Where the link lies in a value.
    const LINK_OFFSET_BYTES: usize;
}

/// Makes a struct with a field of type [`Link`] a [`Node`].
///
/// ```
/// struct Buffer {
///     link: pcpu::Link,
///     bytes: [u8; 4096],
/// }
/// pcpu::stack_node!(Buffer { link });
/// ```
///
/// The field must be a link:
/// ```compile_fail,E0308
/// struct Buffer {
///     link: usize,
/// }
/// pcpu::stack_node!(Buffer { link });
/// ```
///
/// in the node itself, not behind a pointer, and aligned:
/// ```compile_fail,E0308
/// struct Buffer {
///     link: Box<pcpu::Link>,
/// }
/// pcpu::stack_node!(Buffer { link });
/// ```
/// ```compile_fail,E0308
/// struct Buffer {
///     link: &'static pcpu::Link,
/// }
/// pcpu::stack_node!(Buffer { link });
/// ```
/// ```compile_fail,E0793
/// #[repr(packed)]
/// struct Buffer {
///     byte: u8,
///     link: pcpu::Link,
/// }
/// pcpu::stack_node!(Buffer { link });
/// ```
#[macro_export]
macro_rules! stack_node {
    ($type:ident { $field:ident }) => {
        // SAFETY: the function in it makes sure that the field is a link; stacks alone can do anything with one.
        unsafe impl $crate::Node for $type {
            const LINK_OFFSET_BYTES: usize = {
                // A raw pointer: a reference would take a field that only leads to a link for one.
                const fn _is_link(node: &$type) -> *const $crate::Link {
                    let _is_aligned = &node.$field;
                    &raw const node.$field
                }
                ::core::mem::offset_of!($type, $field)
            };
        }
    };
}

/// A pointer that alone leads to its node: a `Box`, or a `&'static mut` where there is no heap.
///
/// # Safety
/// While a value is turned into a raw pointer nothing else leads to the node, and the node stays where it is.
pub unsafe trait NodePointer: Sized {
    /// What it points to.
    type Node: Node;
    /// Gives the pointer up.
    fn into_raw(self) -> NonNull<Self::Node>;
    /// Takes it up again.
    ///
    /// # Safety
    /// `node` comes from [`into_raw`](Self::into_raw), and is taken up once.
    unsafe fn from_raw(node: NonNull<Self::Node>) -> Self;
}

// SAFETY: nothing else leads to what a mutable reference of so long a life points to.
unsafe impl<N: Node> NodePointer for &'static mut N {
    type Node = N;

    fn into_raw(self) -> NonNull<N> {
        self.into()
    }

    unsafe fn from_raw(mut node: NonNull<N>) -> Self {
        // SAFETY: the promise of the caller.
        unsafe { node.as_mut() }
    }
}

#[cfg(feature = "std")]
// SAFETY: a box owns its node, which does not move with it.
unsafe impl<N: Node> NodePointer for std::boxed::Box<N> {
    type Node = N;

    fn into_raw(self) -> NonNull<N> {
        // SAFETY: a box is never null.
        unsafe { NonNull::new_unchecked(Self::into_raw(self)) }
    }

    unsafe fn from_raw(node: NonNull<N>) -> Self {
        // SAFETY: the promise of the caller.
        unsafe { Self::from_raw(node.as_ptr()) }
    }
}

fn link_of<P: NodePointer>(pointer: P) -> *mut usize {
    // SAFETY: the link lies in the node.
    unsafe {
        pointer
            .into_raw()
            .as_ptr()
            .byte_add(P::Node::LINK_OFFSET_BYTES)
            .cast()
    }
}

/// # Safety
/// `link` comes from [`link_of`] and is used once.
unsafe fn pointer_of<P: NodePointer>(link: *mut usize) -> P {
    // SAFETY: so far before its link lies the node (promise of the caller).
    unsafe {
        let node = link.byte_sub(P::Node::LINK_OFFSET_BYTES).cast();
        P::from_raw(NonNull::new_unchecked(node))
    }
}

/// A stack on every CPU, of the nodes that pointers `P` lead to. Each CPU changes its own copy.
///
/// ```
/// use pcpu::{CpuStack, Link, LocalStack, define_per_cpu};
///
/// struct Buffer {
///     link: Link,
///     bytes: Vec<u8>,
/// }
/// pcpu::stack_node!(Buffer { link });
///
/// define_per_cpu! {
///     /// Buffers that nobody uses, by the CPU that they were last used on.
///     static FREE: CpuStack<Box<Buffer>> = CpuStack::new();
/// }
///
/// let buffer = FREE.pop().unwrap_or_else(|| {
///     Box::new(Buffer { link: Link::new(), bytes: Vec::with_capacity(4096) })
/// });
/// FREE.push(buffer);
/// ```
#[derive(FromZeros)]
#[repr(transparent)]
pub struct CpuStack<P: NodePointer> {
    first: UnsafeCell<usize>,
    /// Owns nodes, and takes them through a shared reference: a stack of one kind of nodes is none of another kind.
    nodes: PhantomData<UnsafeCell<P>>,
}

// SAFETY: a copy is changed by the CPU that has it, by operations of one step; the nodes go from one thread to another.
unsafe impl<P: NodePointer + Send> Sync for CpuStack<P> {}
impl<P: NodePointer> CpuStack<P> {
    /// An empty stack.
    pub const fn new() -> Self {
        Self {
            first: UnsafeCell::new(0),
            nodes: PhantomData,
        }
    }

    /// Takes all nodes off this copy, for its only user.
    pub fn take_all(&mut self) -> Chain<P> {
        Chain::new(mem::take(self.first.get_mut()))
    }
}

impl<P: NodePointer> Default for CpuStack<P> {
    fn default() -> Self {
        Self::new()
    }
}

impl<P: NodePointer> Drop for CpuStack<P> {
    fn drop(&mut self) {
        drop(self.take_all());
    }
}

impl<P: NodePointer> fmt::Debug for CpuStack<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuStack").finish_non_exhaustive()
    }
}

/// Nodes that were taken off a stack, the last pushed first. Those that are left are dropped with it.
pub struct Chain<P: NodePointer> {
    /// The first link, or null.
    first: *mut usize,
    nodes: PhantomData<P>,
}

// SAFETY: it owns its nodes.
unsafe impl<P: NodePointer + Send> Send for Chain<P> {}

impl<P: NodePointer> Chain<P> {
    fn new(first: usize) -> Self {
        Self {
            first: ptr::with_exposed_provenance_mut(first),
            nodes: PhantomData,
        }
    }
}

impl<P: NodePointer> Iterator for Chain<P> {
    type Item = P;

    fn next(&mut self) -> Option<P> {
        if self.first.is_null() {
            return None;
        }
        let link = self.first;
        // SAFETY: the chain owns its nodes; each is taken once.
        unsafe {
            self.first = ptr::with_exposed_provenance_mut(link.read());
            Some(pointer_of(link))
        }
    }
}

impl<P: NodePointer> FusedIterator for Chain<P> {}

impl<P: NodePointer> Drop for Chain<P> {
    fn drop(&mut self) {
        self.for_each(drop);
    }
}

impl<P: NodePointer> fmt::Debug for Chain<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain").finish_non_exhaustive()
    }
}

/// The operations on the current CPU's copy of a [`CpuStack`], for static variables and owners.
pub trait LocalStack<P: NodePointer + Send>: Live<Target = CpuStack<P>> + Sized {
    /// Puts a node onto the current CPU's stack.
    #[inline]
    fn push(&self, node: P) {
        // SAFETY: the variable is live.
        unsafe { push(self.handle(), node) }
    }

    /// Takes the last node off the current CPU's stack.
    ///
    /// `None` says that there was nothing to take at this moment: without restartable sequences another thread of the CPU
    /// may be in the middle of taking one, and puts the others back.
    #[inline]
    fn pop(&self) -> Option<P> {
        // SAFETY: the variable is live.
        unsafe { pop(self.handle()) }
    }

    /// Takes all nodes off the current CPU's stack.
    #[inline]
    fn pop_all(&self) -> Chain<P> {
        // SAFETY: the variable is live.
        unsafe { pop_all(self.handle()) }
    }
}

impl<P: NodePointer + Send, H: Live<Target = CpuStack<P>>> LocalStack<P> for H {}

/// Puts a node onto the current CPU's copy of a stack.
///
/// # Safety
/// The variable is live.
#[inline]
pub unsafe fn push<P: NodePointer, D: Domain>(variable: PerCpuPtr<CpuStack<P>, D>, node: P) {
    // SAFETY: live (promise of the caller); the node is the stack's from now on.
    unsafe { D::Ops::push(variable.neutral(), link_of(node)) }
}

/// Takes the last node off the current CPU's copy of a stack; `None` as for [`LocalStack::pop`].
///
/// # Safety
/// The variable is live.
#[inline]
pub unsafe fn pop<P: NodePointer, D: Domain>(variable: PerCpuPtr<CpuStack<P>, D>) -> Option<P> {
    // SAFETY: live (promise of the caller); what is on the stack came by `push`, and is taken once.
    unsafe {
        let link = D::Ops::pop(variable.neutral());
        (!link.is_null()).then(|| pointer_of(link))
    }
}

/// Takes all nodes off the current CPU's copy of a stack.
///
/// # Safety
/// The variable is live.
#[inline]
pub unsafe fn pop_all<P: NodePointer, D: Domain>(variable: PerCpuPtr<CpuStack<P>, D>) -> Chain<P> {
    // SAFETY: live (promise of the caller); what was on the stack is the caller's.
    let first = unsafe { D::Ops::fetch::<u64>(variable.neutral(), Change::Set(0)) };
    // What the nodes hold was written before they were found.
    fence(Ordering::Acquire);
    Chain::new(first as usize)
}
