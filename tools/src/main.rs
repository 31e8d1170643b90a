//! layerctl.
fn main(){}
