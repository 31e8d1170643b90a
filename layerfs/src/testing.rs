//! What tests of several modules make.

/// See there: runs a command in a mount namespace of its own.
pub const ELSEWHERE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/elsewhere");

/// Bytes that don't compress.
pub fn noise(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed + 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..count).map(|_| next()).collect()
}
