//! The sources themselves: the order of the rooms, the header, the build script, and the shipped PTX.

#[cfg(feature = "cuda")]
mod fences;
mod header;
mod layering;
#[cfg(all(unix, feature = "cuda"))]
mod ptx;
