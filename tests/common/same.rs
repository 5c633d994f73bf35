//! What a refused call changes: nothing.

use crate::audit::Picture;

/// Panics unless everything is as before, the counters of failures aside.
pub fn assert_same(before: &Picture, after: &Picture) {
    let without_failures = |picture: &Picture| {
        let mut picture = picture.clone();
        picture.stats.failures = 0;
        picture.stats.atomic_failures = 0;
        picture.stats.spare_shortfalls = 0;
        picture
    };
    assert_eq!(without_failures(before), without_failures(after));
}
