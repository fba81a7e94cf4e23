//! SwiGLU's gate.

/// `out[i] = silu(gate[i]) * up[i]`, `silu(x) = x / (1 + e^-x)`; the shortest slice counts.
pub fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
        *o = g / (1.0 + (-g).exp()) * u;
    }
}
