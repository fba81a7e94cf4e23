//! The read-bandwidth kernel reads exactly the bytes of its source.

use crate::common::{assert_nothing_reported, stream};
use dllm_kernels::ops::read_bandwidth;

#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no CUDA emulator for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn reads_to_the_last_byte_and_no_further() {
    let stream = stream();
    let mut sink = stream.zeros::<u32>(1).unwrap();
    for bytes in [16, 32, 65_536 - 16, 65_536, 65_536 + 16, 1 << 20] {
        // On the CUDA emulator the memory ends at a page that faults.
        let source = stream.zeros::<u8>(bytes).unwrap();
        read_bandwidth::launch(&stream, &source, &mut sink).unwrap();
        stream.synchronize().unwrap();
    }
    assert_eq!(sink.read().unwrap(), [0], "all bytes of the source are zero");
    assert_nothing_reported();
    for bytes in [0, 8, 24] {
        let source = stream.zeros::<u8>(bytes).unwrap();
        let error = read_bandwidth::launch(&stream, &source, &mut sink).unwrap_err().to_string();
        assert!(error.contains("bytes: expected a multiple of 16"), "{error}");
    }
    let foreign = crate::common::device().stream().unwrap().zeros::<u8>(16).unwrap();
    assert!(
        read_bandwidth::launch(&stream, &foreign, &mut sink)
            .unwrap_err()
            .to_string()
            .contains("source: expected a buffer of")
    );
}
