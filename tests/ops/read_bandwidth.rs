//! The read-bandwidth kernel reads exactly the bytes of its source, and all of them.

use crate::common::{assert_nothing_reported, stream};
use dllm_kernels::gpu::Pinned;
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

/// Exclusive or of a thread's words for which the kernel writes its sink.
const SEEN: u32 = 0x9e37_79b9;

/// Every byte of the source takes part: with one word that is [`SEEN`] and zeros elsewhere, the thread that reads it writes the
/// sink. All four bytes of [`SEEN`] differ from zero and from each other, so none of them may be lost, moved or read twice.
#[test]
#[cfg_attr(
    not(all(target_os = "linux", target_arch = "x86_64")),
    ignore = "there is no CUDA emulator for this target: DLLM_TEST_DEVICE=gpu and --include-ignored"
)]
fn every_byte_changes_the_result() {
    let stream = stream();
    let mut sink = stream.zeros::<u32>(1).unwrap();
    // One vector; one thread more than a warp; one vector more than a round of the block; a tail of two blocks.
    for (bytes, step) in [(16, 1), (528, 1), (8_208, 1), (65_536 + 16 * 515, 7)] {
        let words = bytes / 4;
        let mut source = stream.zeros::<u8>(bytes).unwrap();
        let mut memory = Pinned::<u8>::new(stream.device(), bytes).unwrap();
        let mut result = |word: usize, value: u32| {
            memory.write(4 * word, &value.to_le_bytes());
            // SAFETY: the memory lives, and is written again only after the stream was synchronised.
            unsafe { source.write_pinned(4 * word, &memory, 4 * word, 4) }.unwrap();
            sink.write(&[0]).unwrap();
            read_bandwidth::launch(&stream, &source, &mut sink).unwrap();
            sink.read().unwrap()[0]
        };
        // Every word of the first and of the last 16 vectors, and every `step`-th.
        let chosen = (0..words).filter(|word| *word < 64 || word + 64 >= words || word.is_multiple_of(step));
        for word in chosen {
            assert_eq!(result(word, SEEN), SEEN, "{bytes} bytes: word {word} is not read");
            for byte in if word.is_multiple_of(64) || word + 1 == words { 0..4 } else { 0..0 } {
                let changed = result(word, SEEN ^ (1 << (8 * byte)));
                assert_eq!(changed, 0, "{bytes} bytes: byte {byte} of word {word} is not read");
            }
            assert_eq!(result(word, 0), 0, "{bytes} bytes: word {word}");
        }
    }
    assert_nothing_reported();
}
