//! Checkpoints in other element types, and one with a tied head.

use super::lockstep::{TestModel, decode_in_lockstep};
use super::{FAMILIES, small_device};
use crate::common::checkpoint::Checkpoint;
use crate::common::checkpoint::prompts;
use dllm_kernels::{Generator, Model, Options};
use safetensors::Dtype;

/// The values of the made-up checkpoints are exact in bf16, f16 and f32, so each type decodes to the same tokens. Other values are
/// rounded to nearest, ties to even.
pub fn element_types() {
    for family in FAMILIES {
        let tokens = |checkpoint: &Checkpoint| {
            let dir = checkpoint.write();
            let model = Model::open(dir.path()).unwrap().to_device(&small_device(), |_, _| ()).unwrap();
            Generator::new(&model).gen_length(16).block_length(8).generate(&prompts()).unwrap().tokens
        };
        let plain = tokens(&Checkpoint::new(family));
        for dtype in [Dtype::F16, Dtype::F32] {
            assert_eq!(tokens(&Checkpoint::new(family).with_dtype(dtype)), plain, "{family} {dtype:?}");
        }
        // A third of the distance to the next bf16, and half of it from an even one: test_model round down.
        let mut off = Checkpoint::new(family).with_dtype(Dtype::F32);
        for tensor in off.tensors.values_mut() {
            for (i, value) in tensor.values.iter_mut().enumerate().filter(|(_, value)| **value != 0.0) {
                let bits = value.to_bits();
                let even = bits >> 16 & 1 == 0;
                *value = f32::from_bits(bits + if even && i % 2 == 0 { 0x8000 } else { 0x5555 });
            }
        }
        assert_eq!(tokens(&off), plain, "{family}: rounded");
    }
}

pub fn tied_head() {
    for family in FAMILIES {
        let mut checkpoint = Checkpoint::new(family);
        let key = match family {
            dllm_kernels::Family::Llada => "weight_tying",
            dllm_kernels::Family::Dream => "tie_word_embeddings",
        };
        checkpoint.config = checkpoint.config_with(key, Some(true.into()));
        let head = checkpoint.head();
        checkpoint.tensors.remove(head);
        let test_model = TestModel::open(checkpoint.write().path());
        assert!(test_model.model.config().tied_head);
        let options = Options { gen_length: 16, block_length: Some(8), ..Options::default() };
        let (_, tally) =
            decode_in_lockstep(&test_model, &options, &prompts(), &format!("{family}, tied head"), &mut ());
        println!("{family}: {tally}");
    }
}
