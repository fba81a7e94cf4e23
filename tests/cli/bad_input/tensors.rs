use super::*;

#[test]
fn missing() {
    for family in FAMILIES {
        let checkpoint = Checkpoint::new(family);
        for name in checkpoint.tensors.keys() {
            let dir = write(&checkpoint.config.to_string(), &checkpoint.file_of(|n| n != name));
            let shape = format!("expected shape {:?}", checkpoint.tensors[name].shape);
            let words = [dir.path().to_str().unwrap(), name, &shape, "found no such tensor"];
            refused(Model::open(dir.path()), "Tensor", &words);
        }
    }
}

#[test]
fn wrong_shape() {
    for family in FAMILIES {
        let whole = Checkpoint::new(family);
        for name in whole.tensors.keys() {
            let shape = &whole.tensors[name].shape;
            let mut taller = shape.clone();
            taller[0] += 1;
            let mut deeper = shape.clone();
            deeper.push(1);
            // The same number of elements, with the dimensions exchanged.
            let mut turned = shape.clone();
            turned.reverse();
            for wrong in [taller, deeper, turned, vec![], vec![0]] {
                if wrong == *shape {
                    continue;
                }
                let mut checkpoint = whole.clone();
                let tensor = checkpoint.tensor(name);
                tensor.values.resize(wrong.iter().product(), 0.5);
                tensor.shape = wrong.clone();
                let words =
                    [&format!("{FILE}: tensor \"{name}\""), &format!("shape {shape:?}"), &format!("shape {wrong:?}")];
                refused(Model::open(checkpoint.write().path()), "Tensor", &words.map(|w| w.as_str()));
            }
        }
    }
}

#[test]
fn wrong_element_type() {
    for family in FAMILIES {
        for dtype in [Dtype::I64, Dtype::F64] {
            let mut checkpoint = Checkpoint::new(family);
            let name = checkpoint.head();
            checkpoint.tensor(name).dtype = dtype;
            let words = [FILE, name, "expected element type BF16, F16 or F32", &format!("found {dtype:?}")];
            refused(Model::open(checkpoint.write().path()), "Tensor", &words);
        }
    }
}

/// All values are exact in every type. Products of different types may use different units, which sum in another order, so results
/// are equal up to rounding in f32.
#[test]
fn half_and_single_precision_give_the_same_logits() {
    fn same(got: &[f32], want: &[f32], what: &str) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 1e-4, "{what}: {got} {want}");
        }
    }
    for family in FAMILIES {
        let tokens: Vec<u32> = (0..VOCAB as u32).collect();
        let checkpoint = Checkpoint::new(family);
        let want = logits(&open(&checkpoint), &tokens);
        assert!(want.iter().all(|l| l.is_finite()));
        for dtype in [Dtype::F16, Dtype::F32] {
            let got = logits(&open(&checkpoint.clone().with_dtype(dtype)), &tokens);
            same(&got, &want, &format!("{family} {dtype:?}"));
        }
        // Every second tensor has another type, so that stacked matrices have mixed types.
        let mut mixed = checkpoint.clone();
        mixed.tensors.values_mut().step_by(2).for_each(|t| t.dtype = Dtype::F32);
        same(&logits(&open(&mixed), &tokens), &want, &format!("{family} mixed"));
    }
}

#[test]
fn tied_embeddings() {
    for (family, key) in [(Family::Llada, "weight_tying"), (Family::Dream, "tie_word_embeddings")] {
        let mut untied = Checkpoint::new(family);
        let (embedding, head) = (untied.embedding(), untied.head());
        *untied.tensor(head) = untied.tensors[embedding].clone();
        let mut tied = untied.clone();
        tied.config = tied.config_with(key, Some(json!(true)));
        let both = open(&tied);
        tied.tensors.remove(head);
        let alone = open(&tied);
        let tokens: Vec<u32> = (0..VOCAB as u32).collect();
        let want = logits(&open(&untied), &tokens);
        assert_eq!(logits(&alone, &tokens), want);
        assert_eq!(logits(&both, &tokens), want);
        tied.config = untied.config.clone();
        refused(Model::open(tied.write().path()), "Tensor", &[head, "found no such tensor"]);
    }
}
