//! layerctl.
fn main() {}
