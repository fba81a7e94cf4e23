//! Compares advance, launched by the shipped code, with the reference and with the loops of the host.
//!
//! All results must be equal: they are integers, computed from integers and from one f32 product each in Dream's schedule.

mod case;
mod graph;
mod invalid_device_data;
mod loops;
mod states;
