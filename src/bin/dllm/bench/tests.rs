//! Every flag of `dllm bench` reaches the setup of the measurement, and every mode has the options of its name.

use super::*;
use crate::args::tests::{covers, parse, same};

const LINE: &str = "--shape=mid --random-weights --threads=3";

fn setup_of(flags: &str) -> (Setup, Vec<Vec<u32>>) {
    // A flag that is given twice is an error.
    let line = if flags.contains("--threads") { LINE.replace("--threads=3", flags) } else { format!("{LINE} {flags}") };
    let args = parse::<Bench>(&line);
    let setup = setup(&args).unwrap();
    let prompts = prompts(&setup, &args).unwrap();
    (setup, prompts)
}

/// Each flag changes these fields of the setup and no others.
#[test]
fn every_flag_reaches_the_setup() {
    type Change = fn(&mut Setup);
    let random = |setup: &Setup, len: usize, seed: u64| random_prompt(&setup.config, len, seed).unwrap();
    let lines: [(&str, Change); 15] = [
        ("--prompt-length=20", |s| s.prompt.truncate(20)),
        ("--prompt-ids=1,2,3", |s| s.prompt = vec![1, 2, 3]),
        ("--gen-length=16", |s| (s.gen_length, s.block_length) = (16, 16)),
        ("--block-length=8", |s| s.block_length = 8),
        ("--modes=adaptive,vanilla,adaptive", |s| s.modes = vec![Mode::Adaptive, Mode::Vanilla]),
        ("--prompt-interval=9", |s| s.intervals.prompt_interval = 9),
        ("--response-interval=3", |s| s.intervals.response_interval = 3),
        ("--refresh-ratio=0.5", |s| s.intervals.refresh_ratio = Some(0.5)),
        ("--refresh-rows=0.75", |s| s.intervals.refresh_ratio = Some(0.75)),
        ("--refresh-prompt-every=2", |s| s.intervals.refresh_prompt_every = 2),
        ("--batch=3", |s| s.batch = 3),
        ("--device=cuda:1", |s| s.device = Device::Cuda(1)),
        ("--threads=5", |s| s.threads = 5),
        ("--seed=4", |s| s.prompt = random_prompt(&s.config, 64, 4).unwrap()),
        // The number of rounds and the form of the output are read from the arguments.
        ("--repeat=9", |_| {}),
    ];
    for (line, change) in lines {
        let (mut want, _) = setup_of("");
        change(&mut want);
        same(line, &setup_of(line).0, &want);
    }
    let others = ["--model=dir", "--shape=mid", "--random-weights", "--json"];
    covers::<Bench>(lines.iter().map(|(line, _)| *line).chain(others));

    // A batch has different random prompts of one length, or the given prompt several times.
    let (setup, prompts) = setup_of("--batch=3 --prompt-length=20 --seed=4");
    assert_eq!(prompts, [4, 5, 6].map(|seed| random(&setup, 20, seed)));
    assert_eq!(setup_of("--batch=2 --prompt-ids=1,2").1, [[1, 2], [1, 2]]);
    let checkpoint = super::setup(&parse::<Bench>("--model=models/tiny-math")).unwrap();
    assert!(matches!(&checkpoint.source, Source::Checkpoint(dir) if dir == Path::new("models/tiny-math")));
    assert_eq!((setup.config.d_model, checkpoint.config.d_model), (1024, 256));
}

/// Each mode is the cache and the policy of its name, with the intervals of that cache only.
#[test]
fn modes_have_their_options() {
    let flags = "--gen-length=24 --block-length=8 --prompt-interval=9 --response-interval=3 --refresh-ratio=0.5 \
                 --refresh-prompt-every=2";
    let (mut setup, _) = setup_of(flags);
    assert_eq!(setup.modes, Mode::ALL);
    for family in [Family::Llada, Family::Dream] {
        setup.config.family = family;
        for mode in Mode::ALL {
            let (cache, policy) = match mode.name() {
                "vanilla" => (CacheMode::None, Policy::Fixed),
                "prefix-fixed" => (CacheMode::Prefix, Policy::Fixed),
                "dual-fixed" => (CacheMode::Dual, Policy::Fixed),
                "prefix-threshold" => (CacheMode::Prefix, Policy::Threshold(0.9)),
                "dual-threshold" | "dual-joined" => (CacheMode::Dual, Policy::Threshold(0.9)),
                name => (CacheMode::Adaptive, if name == "adaptive" { Policy::Fixed } else { panic!("{name}") }),
            };
            let one_block = family == Family::Dream && matches!(mode.name(), "vanilla" | "adaptive");
            let selects = matches!(mode.name(), "dual-joined" | "adaptive");
            let want = Options {
                gen_length: 24,
                block_length: Some(if one_block { 24 } else { 8 }),
                cache,
                policy,
                prompt_interval: 9,
                response_interval: 3,
                refresh_ratio: selects.then_some(0.5),
                refresh_prompt_every: if mode.name() == "dual-joined" { 2 } else { 1 },
                ..Options::default()
            };
            same(mode.name(), &mode.options(&setup), &want);
        }
    }
}

/// Forwards of one kind, by their seconds.
fn timings(kind: timed::Forward, rows: usize, macs: f64, seconds: &[f64]) -> Vec<Timing> {
    seconds.iter().map(|seconds| Timing { kind, rows, macs, seconds: *seconds }).collect()
}

/// Three rounds of two modes, with times and work that are easy to reckon with: two sequences of 16 tokens each.
fn two_modes() -> (Setup, Subject, Vec<Run>) {
    use timed::Forward::{Block, Full};
    let line = "--model=models/tiny-math --batch=2 --prompt-length=8 --gen-length=16 --modes=vanilla,dual-fixed";
    let setup = setup(&parse::<Bench>(&format!("{line} --threads=3"))).unwrap();
    let subject = Subject {
        model: Model::open("models/tiny-math").unwrap(),
        device: "cpu".into(),
        roofs: Some(Roofs { bytes_per_second: 1e10, operations_per_second: 2e10 }),
        parameters: 12_345_678,
        bytes_per_forward: 3_000_000_000,
    };
    let vanilla = Run {
        mode: Mode::Vanilla,
        nfe: 4,
        launches: None,
        seconds: vec![2.0, 4.0, 3.0],
        timings: timings(Full, 48, 6e9, &[0.25, 0.5].repeat(6)),
        original: vec![],
        original_nfe: 0,
    };
    let cached = Run {
        mode: Mode::DualFixed,
        nfe: 4,
        launches: Some(KernelCounts { layer: 11, pass: 47 }),
        seconds: vec![1.0, 1.5, 1.25],
        timings: [timings(Full, 48, 6e9, &[0.4; 3]), timings(Block, 16, 1e9, &[0.1, 0.2, 0.06].repeat(3))].concat(),
        original: vec![5.0, 7.0, 6.0],
        original_nfe: 8,
    };
    (setup, subject, vec![vanilla, cached])
}

/// Reckons every number of the JSON object by hand.
#[test]
fn numbers_of_the_summary() {
    let (setup, subject, runs) = two_modes();
    let answer = Answer { torch: "2.0".into(), revision: Some("abc".into()), modes: vec![] };
    let summary = summary::Summary::new(&setup, &subject, &runs, Some(answer), None);
    let json = serde_json::to_value(&summary).unwrap();
    let heads =
        ["prompt_length", "gen_length", "block_length", "batch", "threads", "rounds", "weight_bytes_per_forward"];
    assert_eq!(heads.map(|key| json[key].as_u64().unwrap()), [8, 16, 16, 2, 3, 3, 3_000_000_000]);
    assert_eq!(json["roofs"], serde_json::json!({"bytes_per_second": 1e10, "operations_per_second": 2e10}));
    // No revision has completed a round of mode vanilla, the first one.
    assert_eq!(json["originals"]["rounds"], 0);
    let near = |value: &serde_json::Value, want: f64| {
        let got = value.as_f64().unwrap_or_else(|| panic!("{value}, expected {want}"));
        assert!((got - want).abs() <= 1e-9 * want, "{got}, expected {want}");
    };
    let [vanilla, cached] = [&json["modes"][0], &json["modes"][1]];
    for (key, of_vanilla, of_cached) in [
        // The median of 3 s and of 1.25 s over 4 forwards.
        ("ms_per_forward", 750.0, 312.5),
        // 24 GMACs and 9 GMACs a round, over 4 forwards.
        ("multiply_adds_per_forward", 6e9, 2.25e9),
        // 2 x 16 tokens.
        ("tokens_per_second", 32.0 / 3.0, 25.6),
        ("ratio_to_vanilla", 1.0, 2.4),
        ("work_ratio_to_vanilla", 1.0, 24.0 / 9.0),
    ] {
        near(&vanilla[key], of_vanilla);
        near(&cached[key], of_cached);
    }
    assert_eq!((&vanilla["original_nfe"], &vanilla["speedup"]), (&serde_json::Value::Null, &serde_json::Value::Null));
    assert_eq!((&cached["original_nfe"], &cached["launches"]["pass"]), (&8.into(), &47.into()));
    near(&cached["original_ms_per_forward"], 750.0);
    near(&cached["speedup"], 2.4);
    for (kind, numbers) in [
        // 12 GFLOP in 0.375 s on average.
        (&vanilla["kinds"]["full"], [4.0, 375.0, 250.0, 500.0, 48.0, 6e9, 32.0]),
        (&cached["kinds"]["full"], [1.0, 400.0, 400.0, 400.0, 48.0, 6e9, 30.0]),
        // 6 GFLOP in 0.36 s.
        (&cached["kinds"]["block"], [3.0, 100.0, 60.0, 200.0, 16.0, 1e9, 2.0 / 0.12]),
    ] {
        let keys = ["count", "ms", "ms_min", "ms_max", "rows", "multiply_adds", "gflops"];
        keys.iter().zip(numbers).for_each(|(key, number)| near(&kind[key], number));
    }
}

/// Every column of the tables has the number of its head.
#[test]
fn tables_of_the_summary() {
    let (setup, subject, mut runs) = two_modes();
    let answer = || Some(Answer { torch: "2.0".into(), revision: Some("abc".into()), modes: vec![] });
    let text_of = |runs: &[Run], subject: &Subject| {
        summary::Summary::new(&setup, subject, runs, answer(), None).text(subject, runs)
    };
    let text = text_of(&runs, &subject);
    let has = |text: &str, rows: &[&str]| {
        let squeezed: Vec<String> = text.lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        for row in rows {
            assert!(squeezed.iter().any(|line| line == row), "no {row:?} in:\n{text}");
        }
    };
    has(
        &text,
        &[
            "models/tiny-math (LLaDA, 12.3 M parameters), cpu, 2 sequences of 8 prompt tokens, 16 generated in blocks of 16, \
             3 threads, 3 rounds",
            "mode NFE seconds min-max ms/forward full block tokens/s x vanilla",
            "vanilla 4 3.00 2.00-4.00 750 375 10.7 1.00",
            "dual-fixed 4 1.25 1.00-1.50 312 400 100 25.6 2.40",
            "mode G MAC/forward vanilla / this",
            "vanilla 6.000 1.00",
            "dual-fixed 2.250 2.67",
            "forward rows ms min-max G MAC GFLOP/s GB/s floor ms x floor",
            // Of both modes: 15 forwards, 180 GFLOP in 5.7 s. Multiplying takes at least 0.6 s, reading 0.3 s.
            "full 48 400 250-500 6.00 31.6 7.50 600 0.67",
            "block 16 100 60.0-200 1.00 16.7 30.0 300 0.33",
            "Every forward reads at least 2.8 GiB of weights; GB/s is that divided by its time.",
            "A block step launches 47 kernels and products, its first layer 11, as nodes of CUDA graphs.",
            "mode NFE ms/forward reference NFE reference ms/forward reference / ours",
            "dual-fixed 4 312 8 750 2.40",
        ],
    );
    assert!(text.contains("reads 10.0 GB/s, matrix products in bf16 0.020 TFLOP/s"), "{text}");

    // Without roofs there is no floor.
    runs.truncate(1);
    let text = text_of(&runs, &Subject { roofs: None, ..subject });
    has(&text, &["forward rows ms min-max G MAC GFLOP/s GB/s", "full 48 375 250-500 6.00 32.0 8.00"]);
}
