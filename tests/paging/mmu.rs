//! A memory management unit in a process: it maps pages of the arena where page tables say, when they are touched, and
//! remembers them until it is told to forget. Its memory of translations is the process's own address space.
//!
//! So what a kernel forgets to flush stays to be seen, as on a real machine: a frame that is given back while a translation
//! of it is remembered is caught, and so is a page that changed from read-only to writable without a flush.

use std::cell::UnsafeCell;
use std::ops::Range;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};

const PAGE: usize = 4096;
/// What a table of level 1 maps.
const REGION: usize = 2 << 20;
/// How many translations it remembers. When it is full, it forgets all, as a real one forgets at its pleasure.
const CAPACITY: usize = 2048;
/// Units at the same time: one for every machine of a test.
const UNITS: usize = 64;

static REGISTERED: [AtomicPtr<Mmu>; UNITS] = [const { AtomicPtr::new(ptr::null_mut()) }; UNITS];
static HANDLER: Once = Once::new();

/// What page tables say of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    pub frame: u64,
    pub is_writable: bool,
    pub is_executable: bool,
}

#[derive(Debug)]
pub struct Mmu {
    /// The addresses that it looks after.
    pub window: Range<usize>,
    arena: *mut u8,
    arena_bytes: usize,
    file: i32,
    level_4: u64,
    lock: AtomicBool,
    /// (page, frame), under the lock.
    known: UnsafeCell<Vec<(usize, u64)>>,
    /// Tables of level 1 that it has walked through, and may again at any time: (first address, frame), under the lock.
    walked: UnsafeCell<Vec<(usize, u64)>>,
    /// Writes to pages that it took for read-only and that were not any more.
    pub stale_faults: AtomicU64,
    /// Pages that it has mapped, ever.
    pub fills: AtomicU64,
}

// SAFETY: `known` and `walked` are used with the lock held; the rest does not change or is atomic.
unsafe impl Sync for Mmu {}

impl Mmu {
    /// For `bytes` of addresses from a multiple of 512 GiB on. It works as long as it stays where it is.
    pub fn new(
        arena: *mut u8,
        arena_bytes: usize,
        file: i32,
        level_4: u64,
        bytes: usize,
    ) -> Box<Self> {
        const ALIGN: usize = 1 << 39;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping.
        let all = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes + ALIGN,
                libc::PROT_NONE,
                flags,
                -1,
                0,
            )
        };
        assert_ne!(all, libc::MAP_FAILED, "address space");
        let start = all.addr().next_multiple_of(ALIGN);
        // SAFETY: what lies around the window is not needed.
        unsafe {
            libc::munmap(all, start - all.addr());
            let end = start + bytes;
            libc::munmap(
                ptr::with_exposed_provenance_mut(end),
                all.addr() + ALIGN - start,
            );
        }
        let new = Box::new(Self {
            window: start..start + bytes,
            arena,
            arena_bytes,
            file,
            level_4,
            lock: AtomicBool::new(false),
            known: UnsafeCell::new(Vec::with_capacity(CAPACITY)),
            walked: UnsafeCell::new(Vec::with_capacity(CAPACITY)),
            stale_faults: AtomicU64::new(0),
            fills: AtomicU64::new(0),
        });
        HANDLER.call_once(install);
        let place = REGISTERED.iter().find(|place| {
            let this = ptr::from_ref(&*new).cast_mut();
            place
                .compare_exchange(ptr::null_mut(), this, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        });
        assert!(place.is_some(), "too many machines at a time");
        new
    }

    fn locked<T>(&self, act: impl FnOnce(&mut Vec<(usize, u64)>) -> T) -> T {
        while self.lock.swap(true, Ordering::Acquire) {
            std::hint::spin_loop();
        }
        // SAFETY: the lock is held.
        let result = act(unsafe { &mut *self.known.get() });
        self.lock.store(false, Ordering::Release);
        result
    }

    fn word(&self, table: u64, index: usize) -> u64 {
        let at = table as usize + index * 8;
        assert!(at < self.arena_bytes, "a table at {table:#x}");
        // SAFETY: a word of the arena, which kernels change whole.
        unsafe { AtomicU64::from_ptr(self.arena.add(at).cast()) }.load(Ordering::Acquire)
    }

    /// The entry of a table, or `None` if it is not present.
    pub fn entry(&self, table: u64, index: usize) -> Option<Translation> {
        let entry = self.word(table, index);
        (entry & 1 != 0).then_some(Translation {
            frame: entry & 0x000f_ffff_ffff_f000,
            is_writable: entry & 2 != 0,
            is_executable: entry >> 63 == 0,
        })
    }

    pub fn level_4(&self) -> u64 {
        self.level_4
    }

    /// What the tables say of an address now.
    pub fn translate(&self, address: usize) -> Option<Translation> {
        let mut found = Translation {
            frame: self.level_4,
            is_writable: true,
            is_executable: true,
        };
        for level in (0..4).rev() {
            let entry = self.entry(found.frame, address >> (12 + 9 * level) & 511)?;
            found.frame = entry.frame;
            found.is_writable &= entry.is_writable;
            found.is_executable &= entry.is_executable;
        }
        Some(found)
    }

    /// Forgets these addresses.
    pub fn forget(&self, range: Range<usize>) {
        self.locked(|known| {
            let mut left = Vec::with_capacity(CAPACITY);
            for &(page, frame) in known.iter() {
                if range.contains(&page) {
                    unmap(page);
                } else {
                    left.push((page, frame));
                }
            }
            *known = left;
            // SAFETY: the lock is held.
            let walked = unsafe { &mut *self.walked.get() };
            // What has not gone from the tables, it looks up again, as a real one does unasked.
            walked.retain_mut(|(region, table)| {
                if range.start >= *region + REGION || range.end <= *region {
                    return true;
                }
                let now = self.table(*region);
                *table = now.unwrap_or(0);
                now.is_some()
            });
        });
    }

    /// The table of level 1 for an address.
    fn table(&self, address: usize) -> Option<u64> {
        let mut table = self.level_4;
        for level in (1..4).rev() {
            table = self.entry(table, address >> (12 + 9 * level) & 511)?.frame;
        }
        Some(table)
    }

    /// Whether it remembers a translation to this frame, or by this table: of what address.
    pub fn knows(&self, frame: u64) -> Option<usize> {
        self.locked(|known| {
            // SAFETY: the lock is held.
            let walked = unsafe { &*self.walked.get() };
            let mut all = known.iter().chain(walked);
            all.find(|(_, of)| *of == frame).map(|(at, _)| *at)
        })
    }

    /// A page was touched that it does not know, or not well enough. Whether the tables have it.
    fn fill(&self, address: usize, is_write: bool, was_known: bool) -> bool {
        let page = address / PAGE * PAGE;
        self.locked(|known| {
            let Some(found) = self
                .translate(page)
                .filter(|found| found.is_writable || !is_write)
            else {
                return false;
            };
            if was_known {
                // Another thread may have been quicker.
                if known.contains(&(page, found.frame)) {
                    return true;
                }
                self.stale_faults.fetch_add(1, Ordering::Relaxed);
            }
            if known.len() == CAPACITY {
                known.drain(..).for_each(|(page, _)| unmap(page));
            }
            let write = if found.is_writable {
                libc::PROT_WRITE
            } else {
                0
            };
            // SAFETY: a page of the window, of nobody else's; the frame lies in the arena.
            let mapped = unsafe {
                libc::mmap(
                    ptr::with_exposed_provenance_mut(page),
                    PAGE,
                    libc::PROT_READ | write,
                    libc::MAP_SHARED | libc::MAP_FIXED,
                    self.file,
                    found.frame as libc::off_t,
                )
            };
            if mapped == libc::MAP_FAILED {
                return false;
            }
            known.retain(|(of, _)| *of != page);
            known.push((page, found.frame));
            // SAFETY: the lock is held.
            let walked = unsafe { &mut *self.walked.get() };
            let region = page / REGION * REGION;
            let table = self.table(page).unwrap_or(0);
            walked.retain(|(of, _)| *of != region);
            assert!(walked.len() < CAPACITY, "too many tables");
            walked.push((region, table));
            self.fills.fetch_add(1, Ordering::Relaxed);
            true
        })
    }
}

impl Drop for Mmu {
    fn drop(&mut self) {
        let this = ptr::from_mut(self);
        for place in &REGISTERED {
            let _ =
                place.compare_exchange(this, ptr::null_mut(), Ordering::AcqRel, Ordering::Relaxed);
        }
        // SAFETY: nobody uses the window any more.
        unsafe {
            libc::munmap(
                ptr::with_exposed_provenance_mut(self.window.start),
                self.window.len(),
            )
        };
    }
}

fn unmap(page: usize) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let at = ptr::with_exposed_provenance_mut(page);
    // SAFETY: a page of the window: what was mapped there is forgotten.
    let mapped = unsafe { libc::mmap(at, PAGE, libc::PROT_NONE, flags, -1, 0) };
    assert_ne!(mapped, libc::MAP_FAILED);
}

fn install() {
    // SAFETY: the handler does what it does on the thread that touched a page, which holds no lock of its own.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_fault as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        assert_eq!(libc::sigaction(libc::SIGSEGV, &action, ptr::null_mut()), 0);
    }
}

extern "C" fn on_fault(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: what the system tells a handler.
    let (address, error) = unsafe {
        let context = &*context.cast::<libc::ucontext_t>();
        let error = context.uc_mcontext.gregs[libc::REG_ERR as usize];
        ((*info).si_addr().addr(), error)
    };
    for place in &REGISTERED {
        // SAFETY: registered as long as it lives; nobody touches the window of one that is going.
        let mmu = unsafe { place.load(Ordering::Acquire).as_ref() };
        let Some(mmu) = mmu.filter(|mmu| mmu.window.contains(&address)) else {
            continue;
        };
        // A page without access counts as not there.
        let is_known = error & 1 != 0
            && mmu.locked(|known| {
                let page = address / PAGE * PAGE;
                known.iter().any(|(of, _)| *of == page)
            });
        if mmu.fill(address, error & 2 != 0, is_known) {
            return;
        }
    }
    // A true fault: as if nobody had looked after it.
    // SAFETY: the default handler takes over when the instruction is tried again.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}
