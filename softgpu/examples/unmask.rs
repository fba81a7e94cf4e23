//! `cargo run --release -p softgpu --example unmask`: runs `examples/unmask.rs` of dllm-kernels on the CUDA emulator.

#[path = "../../examples/unmask.rs"]
mod unmask;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    softgpu::install();
    unmask::main()
}
