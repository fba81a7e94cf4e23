//! The cases of `selftest`, which `dllm doctor` and the benches share: every op computes what its case expects, in several
//! thread orders, and every case finds a result that is wrong.

use crate::common::{on_device, once_on_device, stream};
use dllm_kernels::Confidence;
use dllm_kernels::gpu::Module;
use dllm_kernels::ops::attention::{Form, Heads};
use dllm_kernels::ops::gather_scatter::Copy;
use dllm_kernels::ops::tiles::Sequence;
use dllm_kernels::sampling::{CommitRule, QuotaSchedule};
use dllm_kernels::selftest::attention::{Sequences, Visits};
use dllm_kernels::selftest::{self, Case, Entry, ErrorBound, Rows, broken};
use dllm_kernels::selftest::{advance, attention, gather_scatter, top_k_top_p, unmask};
use half::{bf16, f16};
use std::collections::BTreeMap;

/// The checks of `dllm doctor`, and forms that the benches measure besides.
fn entries() -> Vec<Entry> {
    selftest::entries(true).into_iter().chain(attention_forms()).chain(sampling_forms()).chain(other_forms()).collect()
}

fn attention_forms() -> Vec<Entry> {
    let heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 64 };
    let sequences = vec![Sequence { rows: 70, keys: [300, 70, 0] }, Sequence { rows: 3, keys: [0, 3, 100] }];
    let forms = [(Form::Streaming, Visits::All), (Form::Full, Visits::All), (Form::Full, Visits::Every(3))];
    let entry = |(form, visits)| {
        let (form, lse) = (Some(form), false);
        let shape = attention::Shape { heads, sequences: sequences.clone(), visits, form, lse };
        Entry::new::<bf16, _>("attention", format!("{form:?}, {visits:?}"), move |stream| {
            Sequences::<bf16>::new(stream, shape.clone())
        })
    };
    forms.map(entry).into()
}

fn sampling_forms() -> Vec<Entry> {
    let plain = unmask::Shape::llada(vec![4, 3], 1000, 0.5);
    let rules = [CommitRule::Quota(2), CommitRule::ThresholdTopN { threshold: 0.25, top_n: 2 }];
    let mut shapes = rules.map(|rule| unmask::Shape { rule, ..plain.clone() }).to_vec();
    shapes.push(unmask::Shape { confidence: Confidence::Entropy, temperature: 0.5, ..plain.clone() });
    let block = |shape: unmask::Shape| {
        let name = format!("{:?} {:?}", shape.confidence, shape.rule);
        Entry::new::<f32, _>("unmask", name, move |stream| unmask::Block::<f32>::new(stream, shape.clone()))
    };
    let (top_p, top_k) = (None, Some(50));
    let top_k = top_k_top_p::Shape { rows: 3, vocab_size: 1000, top_p, top_k, temperature: 1.0, odd: false };
    let thresholds = Entry::new::<bf16, _>("top_k_top_p", "top-k alone".into(), move |stream| {
        top_k_top_p::Thresholds::<bf16>::new(stream, top_k)
    });
    shapes.into_iter().map(block).chain([thresholds]).collect()
}

fn other_forms() -> Vec<Entry> {
    let schedules = [QuotaSchedule::Dream(vec![0.25; 8]), QuotaSchedule::Unlimited];
    let passes = schedules.map(|schedule| {
        let name = format!("{schedule:?}");
        let shape =
            advance::Shape { sequences: 3, length: 90, block: 32, schedule, end_tokens: vec![7, 8], odd: false };
        Entry::with_dtype("advance", name, "i32", move |stream| advance::Passes::new(stream, shape.clone()))
    });
    let copies = [(Copy::Gather, Some(4)), (Copy::Scatter, None)].map(|(copy, count)| {
        let shape = gather_scatter::Shape { copy, rows: 6, width: 16, count };
        Entry::new::<f16, _>("gather_scatter", format!("{copy:?}, {count:?}"), move |stream| {
            gather_scatter::Copied::<f16>::new(stream, shape)
        })
    });
    passes.into_iter().chain(copies).collect()
}

/// Makes and launches the case.
fn launched(entry: &Entry) -> Box<dyn Case> {
    let mut case = (entry.make)(&stream()).unwrap();
    case.launch().unwrap();
    case
}

/// Checks the cases of an op.
fn check(op: &str) -> Vec<ErrorBound> {
    let mut all = Vec::new();
    let entries = entries();
    for entry in entries.iter().filter(|entry| entry.op == op) {
        let mut case = launched(entry);
        for rows in [Rows::All, Rows::Few] {
            let bounds = case.check(rows).unwrap();
            assert_eq!(broken(&bounds), None, "{op}, {}, {rows:?}", entry.shape);
            all.extend(bounds);
        }
        // These restore everything that a launch changes.
        if ["advance", "unmask"].contains(&op) {
            case.reset().unwrap();
            case.launch().unwrap();
            assert_eq!(broken(&case.check(Rows::All).unwrap()), None, "{op}, {}, second launch", entry.shape);
        }
    }
    assert!(!all.is_empty(), "{op} has no case");
    all
}

/// Defines a test for each op, and the list of them.
macro_rules! each_op {
    ($($op:ident),* $(,)?) => {
        const OPS: &[&str] = &[$(stringify!($op)),*];
        $(fn $op() -> Vec<ErrorBound> { check(stringify!($op)) })*
        on_device!($($op),*);
    };
}

each_op!(
    attention,
    merge_state,
    unmask,
    top_k_top_p,
    advance,
    vverify,
    gather_scatter,
    embed,
    norm,
    rope,
    swiglu,
    product,
);

once_on_device!(a_changed_word_is_found, a_missing_launch_is_found, bytes_and_operations);

/// Changes the first, the middle and the last word of everything that a launch writes, one at a time.
fn a_changed_word_is_found() {
    let (mut missed, mut compared) = (Vec::new(), BTreeMap::new());
    for entry in entries() {
        let mut case = launched(&entry);
        let outputs: Vec<_> = case.outputs().iter().map(|output| (output.what, output.words)).collect();
        for (output, (what, words)) in outputs.into_iter().enumerate() {
            *compared.entry((entry.op, what)).or_insert(0) += words;
            let Some(last) = words.checked_sub(1) else { continue };
            for word in [0, words / 2, last] {
                case.outputs()[output].memory.flip(word).unwrap();
                // The middle word may be of a row that is none of the few.
                let few = (word == 0 || word == last).then_some(Rows::Few);
                for rows in few.into_iter().chain([Rows::All]) {
                    if broken(&case.check(rows).unwrap()).is_none() {
                        missed.push(format!("{}, {}: word {word} of {what}, {rows:?}", entry.op, entry.shape));
                    }
                }
                case.outputs()[output].memory.flip(word).unwrap();
            }
        }
        assert_eq!(broken(&case.check(Rows::All).unwrap()), None, "{}, {}: restored", entry.op, entry.shape);
    }
    assert!(missed.is_empty(), "not found:\n{}", missed.join("\n"));
    // Some case of the op has the output.
    assert!(compared.values().all(|words| *words > 0), "{compared:?}");
    assert!(OPS.iter().all(|op| compared.keys().any(|(of, _)| of == op)), "{compared:?}");
}

fn a_missing_launch_is_found() {
    let mut missed = Vec::new();
    for entry in entries() {
        let case = (entry.make)(&stream()).unwrap();
        for rows in [Rows::All, Rows::Few] {
            if broken(&case.check(rows).unwrap()).is_none() {
                missed.push(format!("{}, {}, {rows:?}", entry.op, entry.shape));
            }
        }
    }
    assert!(missed.is_empty(), "not found:\n{}", missed.join("\n"));
}

/// Bytes and floating-point operations, counted by hand.
fn bytes_and_operations() {
    let heads = 2 * 64;
    // Keys of the two sequences: all of them; then two of six tiles, and one of two.
    let (all, third) = (370 + 103, 128 + 64);
    let pairs = |keys: [usize; 2]| (70 * keys[0] + 3 * keys[1]) as u64;
    let attention = |keys: usize| 2 * 2 * keys * heads + 2 * 2 * 73 * 2 * heads;
    let sequence = 2 * 64;
    for (op, shape, bytes, flops) in [
        ("attention", "1x8 4/4x128, 192 keys in 3 parts", 2 * 2 * (192 + 8) * 512, 4 * 8 * 192 * 512),
        ("attention", "Some(Full), All", attention(all), 4 * pairs([370, 103]) * 256),
        ("attention", "Some(Full), Every(3)", attention(third), 4 * pairs([128, 64]) * 256),
        ("merge_state", "2x32x128", 3 * 64 * (128 * 2 + 4), 0),
        ("unmask", "2x126464, threshold", 2 * 126_464 * 2, 0),
        ("unmask", "5, 0 and 7 x 1003, margin, factor, NaN", 12 * 1003 * 2, 0),
        ("top_k_top_p", "top-p, top-k 5x1003, unmasked row, NaN", 5 * 1003 * 2, 0),
        ("advance", "4 sequences of 256, LLaDA's schedule", 4 * (sequence + 4 * (5 + 128)), 0),
        ("advance", "5 of 77, carry-over, ends and a failure", 5 * (sequence + 4 * (6 + 38)), 0),
        ("vverify", "4x3x4096, a quarter", 2 * 12 * 4096 * 2, 0),
        ("vverify", "13, 0 and 24 rows of 40, mapped, updated", 3 * 37 * 40 * 2, 0),
        ("gather_scatter", "gather 3x4096", 3 * (2 * 4096 * 2 + 4), 0),
        ("embed", "3x4096", 3 * (2 * 4096 * 2 + 4), 0),
        ("norm", "2x4096", 4 * 2 * 4096 * 2, 0),
        ("rope", "2x32/32x128", 2 * (2 * 64 + 3 * 32) * 128 * 2, 0),
        ("swiglu", "2x12288", 3 * 2 * 12_288 * 2, 0),
        ("product", "8x64 by 64x64", (8 * 64 + 64 * 64 + 8 * 64) * 2, 0),
        ("product", "5x40 by 40x24 into f32", (5 * 40 + 24 * 40) * 2 + 5 * 24 * 4, 0),
    ] {
        let entries = entries();
        let entry = entries.iter().find(|entry| entry.op == op && entry.shape == shape);
        let case = (entry.unwrap_or_else(|| panic!("no {op}, {shape}")).make)(&stream()).unwrap();
        assert_eq!((case.bytes(), case.flops()), (bytes, flops), "{op}, {shape}");
    }
}

/// Every kernel belongs to a checked op, or measures the bandwidth; and `dllm doctor` checks each op twice.
#[test]
fn every_kernel_is_checked() {
    for module in Module::all() {
        assert!(OPS.contains(&module.name) || module.name == "read_bandwidth", "{} is not checked", module.name);
    }
    for small in [true, false] {
        let ops: Vec<_> = selftest::entries(small).iter().map(|entry| entry.op).collect();
        let twice: Vec<_> = OPS.iter().flat_map(|op| [*op; 2]).collect();
        assert_eq!(ops, twice, "small: {small}");
    }
}
