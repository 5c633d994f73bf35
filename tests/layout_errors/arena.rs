//! Memory for the builders that knows of every cache line whether it is handed out, fails the n-th call on
//! demand, and starts out dirty where it says so.

use std::{
    alloc::{Layout, alloc, dealloc},
    collections::BTreeSet,
    ptr::NonNull,
};

use pcpu::{
    embed::{AreaRequest, EarlyMemory},
    page::PageMemory,
    unit::{Contents, NodeId},
};

pub const LINE_BYTES: usize = 64;
const ARENA_BYTES: usize = 4 << 20;

/// How an arena behaves.
#[derive(Clone, Copy)]
pub struct Home {
    /// The call that fails, counted from 0 over all calls that may.
    pub failing_call: usize,
    pub contents: Contents,
    /// Added to the size of a unit.
    pub extra_stride_bytes: usize,
    /// Between the areas of two groups.
    pub gap_bytes: usize,
    pub vm_space_bytes: usize,
    pub page_bytes: usize,
}

impl Default for Home {
    fn default() -> Self {
        Self {
            failing_call: usize::MAX,
            contents: Contents::Dirty,
            extra_stride_bytes: 0,
            gap_bytes: 0,
            vm_space_bytes: 1 << 40,
            page_bytes: 4096,
        }
    }
}

/// Memory that records what is handed out.
pub struct Arena {
    pub home: Home,
    pub start: NonNull<u8>,
    pub next_bytes: usize,
    pub calls: usize,
    /// The cache lines that are handed out.
    pub held: BTreeSet<usize>,
    pub window: Option<(usize, usize)>,
    pub allocated_bytes: usize,
    pub returned_bytes: usize,
    /// The node of each area or page.
    pub nodes: Vec<u32>,
}

impl Arena {
    fn layout() -> Layout {
        Layout::from_size_align(ARENA_BYTES, 64 << 10).unwrap()
    }

    pub fn new(home: Home) -> Self {
        // SAFETY: the size isn't 0.
        let start = NonNull::new(unsafe { alloc(Self::layout()) }).unwrap();
        // SAFETY: the block is as large as that.
        unsafe { start.write_bytes(0xee, ARENA_BYTES) };
        Self {
            home,
            start,
            next_bytes: 0,
            calls: 0,
            held: BTreeSet::new(),
            window: None,
            allocated_bytes: 0,
            returned_bytes: 0,
            nodes: Vec::new(),
        }
    }

    /// Counts a call; fails the one that is to fail.
    fn call(&mut self) -> Result<(), &'static str> {
        self.calls += 1;
        if self.calls - 1 == self.home.failing_call {
            Err("out of memory")
        } else {
            Ok(())
        }
    }

    fn hand_out(&mut self, address: usize, bytes: usize) {
        assert!(
            address.is_multiple_of(LINE_BYTES) && bytes.is_multiple_of(LINE_BYTES) && bytes > 0
        );
        for line in (address..address + bytes).step_by(LINE_BYTES) {
            assert!(self.held.insert(line), "handed out twice");
        }
        self.fill(address, bytes, self.fresh_byte());
        self.allocated_bytes += bytes;
    }

    /// What goes back was never written to: neither before a roll-back nor in tails and unused units.
    fn take_back(&mut self, address: usize, bytes: usize) {
        assert!(bytes > 0);
        let fresh = self.fresh_byte();
        assert!(
            self.read(address, bytes).iter().all(|byte| *byte == fresh),
            "touched in vain"
        );
        for line in (address..address + bytes).step_by(LINE_BYTES) {
            assert!(self.held.remove(&line), "taken back what wasn't out");
        }
        self.fill(address, bytes, 0xee);
        self.returned_bytes += bytes;
    }

    fn fresh_byte(&self) -> u8 {
        match self.home.contents {
            Contents::Zeroed => 0,
            Contents::Dirty => 0xaa,
        }
    }

    fn fill(&self, address: usize, bytes: usize, byte: u8) {
        let offset = address - self.start.as_ptr().addr();
        assert!(offset + bytes <= ARENA_BYTES);
        // SAFETY: inside the block, as just checked.
        unsafe { self.start.add(offset).write_bytes(byte, bytes) };
    }

    pub fn read(&self, address: usize, bytes: usize) -> Vec<u8> {
        let offset = address - self.start.as_ptr().addr();
        assert!(offset + bytes <= ARENA_BYTES);
        // SAFETY: inside the block, all of which is initialised; nobody writes to it meanwhile.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(offset), bytes) }.to_vec()
    }

    pub fn assert_empty(&self) {
        assert!(self.held.is_empty() && self.window.is_none());
        assert_eq!(self.returned_bytes, self.allocated_bytes);
        let all = self.read(self.start.as_ptr().addr(), ARENA_BYTES);
        assert!(
            all.iter().all(|byte| *byte == 0xee),
            "written outside of what was handed out"
        );
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: allocated so in `new`.
        unsafe { dealloc(self.start.as_ptr(), Self::layout()) };
    }
}

// SAFETY: areas are bumped off one block, hence disjoint and in bounds, and aligned as asserted.
unsafe impl EarlyMemory for Arena {
    type Error = &'static str;

    fn unit_stride_bytes(&self, unit_bytes: usize) -> usize {
        unit_bytes.wrapping_add(self.home.extra_stride_bytes)
    }
    fn contents(&self) -> Contents {
        self.home.contents
    }
    fn vm_space_bytes(&self) -> usize {
        self.home.vm_space_bytes
    }
    fn alloc_area(&mut self, request: AreaRequest) -> Result<NonNull<u8>, &'static str> {
        self.call()?;
        assert_eq!(
            request.stride_bytes,
            EarlyMemory::unit_stride_bytes(self, request.unit_bytes)
        );
        assert!(request.align_bytes.is_power_of_two() && request.align_bytes <= 64 << 10);
        let offset = self.next_bytes.next_multiple_of(request.align_bytes);
        // SAFETY: `fill` checks that the units are in the block.
        let area = unsafe { self.start.add(offset) };
        for unit in 0..request.nr_units as usize {
            self.hand_out(
                area.as_ptr().addr() + unit * request.stride_bytes,
                request.unit_bytes,
            );
        }
        self.next_bytes =
            offset + request.nr_units as usize * request.stride_bytes + self.home.gap_bytes;
        self.nodes.push(request.node.get());
        Ok(area)
    }
    unsafe fn free(&mut self, start: NonNull<u8>, bytes: usize) {
        self.take_back(start.as_ptr().addr(), bytes);
    }
}

// SAFETY: there is one window, in one block, and pages are handed out once.
unsafe impl PageMemory for Arena {
    type Error = &'static str;

    fn page_bytes(&self) -> usize {
        self.home.page_bytes
    }
    fn unit_stride_bytes(&self, unit_bytes: usize) -> usize {
        unit_bytes.wrapping_add(self.home.extra_stride_bytes)
    }
    fn contents(&self) -> Contents {
        self.home.contents
    }
    fn reserve_window(&mut self, bytes: usize) -> Result<NonNull<u8>, &'static str> {
        self.call()?;
        assert!(bytes <= ARENA_BYTES);
        assert_eq!(
            self.window.replace((self.start.as_ptr().addr(), bytes)),
            None
        );
        Ok(self.start)
    }
    unsafe fn map_new_page(
        &mut self,
        node: NodeId,
        address: NonNull<u8>,
    ) -> Result<(), &'static str> {
        self.call()?;
        let (window, bytes) = self.window.expect("a window");
        let address = address.as_ptr().addr();
        assert!(address.is_multiple_of(self.home.page_bytes));
        assert!(address >= window && address + self.home.page_bytes <= window + bytes);
        self.hand_out(address, self.home.page_bytes);
        self.nodes.push(node.get());
        Ok(())
    }
    unsafe fn unmap_page(&mut self, address: NonNull<u8>) {
        self.take_back(address.as_ptr().addr(), self.home.page_bytes);
    }
    unsafe fn release_window(&mut self, base: NonNull<u8>, bytes: usize) {
        assert!(self.held.is_empty(), "released with pages in it");
        assert_eq!(self.window.take(), Some((base.as_ptr().addr(), bytes)));
    }
}
