//! A process that does not install the CUDA emulator does not use it.

#[test]
fn nothing_is_installed_unasked() {
    assert!(!softgpu::active());
    // SAFETY: only asks the system's loader.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return; // a machine without a GPU, as expected
    }
    let name = cudarc::driver::CudaContext::new(0).and_then(|context| context.name()).unwrap_or_default();
    assert!(!name.starts_with("software device"));
}
