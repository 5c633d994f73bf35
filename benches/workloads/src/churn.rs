//! Churn: many live areas of mixed sizes, of which a random one is freed and a new one allocated.

use fastrand::Rng;

use crate::WorkloadError;
use crate::areas::{Live, Source};

/// Sizes in bytes and how many of 100 areas have them.
const SIZES: [(u16, usize); 7] = [
    (8, 60),
    (16, 15),
    (32, 10),
    (64, 6),
    (128, 4),
    (256, 3),
    (512, 2),
];

/// Which sizes 100 areas have.
const HUNDRED: [u8; 100] = {
    let mut hundred = [0; 100];
    let (mut size, mut at) = (0, 0);
    while size < SIZES.len() {
        let end = at + SIZES[size].1;
        while at < end {
            hundred[at] = size as u8;
            at += 1;
        }
        size += 1;
    }
    assert!(at == 100, "the weights are per cent");
    hundred
};

/// The memory that the copies of `live` areas take on `cpus` CPUs, on average.
pub fn copies_bytes(live: u32, cpus: u32) -> u64 {
    let bytes = |&size: &u8| u64::from(SIZES[size as usize].0);
    let hundred_bytes: u64 = HUNDRED.iter().map(bytes).sum();
    u64::from(live) * u64::from(cpus) * hundred_bytes / 100
}

/// Live areas and the order in which they are replaced: the same sizes in the same order for every source.
#[derive(Debug)]
pub struct Churn<S: Source> {
    live: Live<S>,
    /// One for each size.
    kinds: [S::Kind; SIZES.len()],
    random: Rng,
}

impl<S: Source> Churn<S> {
    /// So many live areas.
    ///
    /// # Errors
    /// As the source.
    pub fn new(source: S, live: u32) -> Result<Self, WorkloadError> {
        let mut random = Rng::with_seed(1);
        let size = |_| SIZES[any_size(&mut random)].0.into();
        let live = Live::new(source, (0..live).map(size))?;
        Ok(Self {
            live,
            kinds: SIZES.map(|(bytes, _)| source.kind(bytes.into())),
            random,
        })
    }

    /// Replaces a random area, so many times.
    ///
    /// # Errors
    /// As the source.
    #[inline(never)]
    pub fn replace(&mut self, iters: u64) -> Result<(), WorkloadError> {
        for _ in 0..iters {
            let index = self.random.usize(..self.live.areas().len());
            let size = any_size(&mut self.random);
            self.live.replace(index, &self.kinds[size])?;
        }
        Ok(())
    }
}

#[inline(always)]
fn any_size(random: &mut Rng) -> usize {
    HUNDRED[random.usize(..HUNDRED.len())].into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hundred_areas_have_the_sizes_that_the_weights_say() {
        assert_eq!(copies_bytes(100, 1), 3728);
        for (size, (_, weight)) in SIZES.into_iter().enumerate() {
            let same = HUNDRED.iter().filter(|&&other| usize::from(other) == size);
            assert_eq!(same.count(), weight);
        }
    }
}
