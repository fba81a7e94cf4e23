//! `dllm` as a process: output, files, exit status.

use crate::common::process::{Process, run, run_within};
use crate::common::recorded::{self, golden_dir};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A checkpoint of the recordings, which has no tokenizer, and the prompt of a decode that was recorded with it. `family` is the
/// `model_type` of its config. Where there is none, says so.
fn recorded_model(family: &str) -> Option<(PathBuf, Vec<u32>)> {
    let decodes = recorded::names("trajectory");
    let found = decodes.iter().find_map(|name| {
        let case = recorded::json(name);
        let model = golden_dir().join(case["model"].as_str().unwrap());
        let config: Value = serde_json::from_slice(&std::fs::read(model.join("config.json")).unwrap()).unwrap();
        (config["model_type"] == family).then(|| (model, numbers::<Vec<Vec<u32>>>(&case["prompt"]).swap_remove(0)))
    });
    if found.is_none() {
        recorded::not_run(&format!("trajectory of a model of type {family}"));
    }
    found
}

/// The value of `--prompt-ids`.
fn ids(prompt: &[u32]) -> String {
    prompt.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// `dllm` with this model.
fn dllm_with(model: &Path, line: &str) -> Command {
    let mut command = dllm(words(line));
    command.arg("--model").arg(model);
    command
}

fn json_with(model: &Path, line: &str) -> Value {
    serde_json::from_slice(&done(dllm_with(model, line)).stdout).unwrap()
}

fn dllm<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dllm"));
    command.args(args).current_dir(root()).stdin(Stdio::null());
    command
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Runs a command, which must end with status 0.
fn done(mut command: Command) -> Output {
    let output = run(&mut command);
    assert_eq!(output.status.code(), Some(0), "{command:?}: {}", text(&output.stderr));
    output
}

fn json_of(line: &str) -> Value {
    serde_json::from_slice(&done(dllm(words(line))).stdout).unwrap()
}

fn numbers<T: serde::de::DeserializeOwned>(value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{e}: {value}"))
}

#[test]
fn alone_it_answers_a_question_and_shows_how() {
    let output = done(dllm::<&str>([]));
    let answer = text(&output.stdout);
    assert!(answer.contains("####") && answer.ends_with('\n'), "{answer:?}");
    assert!(!answer.contains("<|"), "special tokens in {answer:?}");
    let shown = text(&output.stderr);
    assert!(shown.contains("block 1/2") && shown.contains('░') && shown.contains("NFE"), "{shown}");
    assert!(!shown.contains('\x1b'), "control sequences into a pipe: {shown:?}");
}

#[test]
fn json_says_what_text_output_says() {
    let plain = done(dllm(words("generate --gen-length 64")));
    let json = json_of("generate --gen-length 64 --json");
    let mut keys: Vec<_> = json.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["device", "nfe", "seconds", "text", "tokens", "tokens_per_second"]);
    assert_eq!(format!("{}\n", json["text"].as_str().unwrap()), text(&plain.stdout));
    assert_eq!(numbers::<Vec<u32>>(&json["tokens"]).len(), 64);
    assert_eq!(json["device"], "cpu");
    assert!(numbers::<usize>(&json["nfe"]) > 1);
    assert!(numbers::<f64>(&json["seconds"]) > 0.0 && numbers::<f64>(&json["tokens_per_second"]) > 0.0);
    // The summary counts the same forwards.
    assert!(text(&plain.stderr).contains(&format!("NFE {},", json["nfe"])));
}

#[test]
fn prompt_file_and_templated_prompt_are_the_same_as_chat() {
    let question =
        "Nina buys 9 plums for 3 dollars each and 7 stamps for 8 dollars each. How many dollars does she pay?";
    let templated = format!(
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>\
         <|start_header_id|>assistant<|end_header_id|>\n\n"
    );
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    std::fs::write(&file, &templated).unwrap();
    let chat = done(dllm(["generate", "--gen-length", "64", "--chat", "--prompt", question]));
    let plain = done(dllm(["generate", "--gen-length", "64", "--prompt-file", file.to_str().unwrap()]));
    assert!(text(&chat.stdout).contains("#### "), "{}", text(&chat.stdout));
    assert_eq!(text(&chat.stdout), text(&plain.stdout));
}

#[test]
fn a_ragged_batch_gives_what_its_prompts_give_alone() {
    let Some((model, prompt)) = recorded_model("llada") else { return };
    let (one, other) = prompt.split_at(prompt.len() / 3);
    let [one, other] = [one, other].map(|prompt| format!("--prompt-ids {}", ids(prompt)));
    let run =
        |prompts: &str| json_with(&model, &format!("generate --gen-length 32 --block-length 16 --json {prompts}"));
    let batch = run(&format!("{one} {other}"));
    let (first, second) = (run(&one), run(&other));
    assert_eq!(batch["tokens"][0], first["tokens"]);
    assert_eq!(batch["tokens"][1], second["tokens"]);
    assert_ne!(first["tokens"], second["tokens"]);
    assert_eq!(batch["text"], serde_json::json!([null, null]));
}

#[test]
fn a_batch_of_texts_is_answered_in_order() {
    let one = ["--prompt", "Leo has 12 beads. He finds 5 more. How many beads does Leo have?"];
    let two = ["--prompt", "Maya has 47 peaches. Nina has 8 fewer peaches than Maya. How many does Nina have?"];
    let run = |prompts: &[&str]| {
        let flags = ["generate", "--chat", "--gen-length", "64", "--early-stop"];
        String::from_utf8(done(dllm(flags.iter().chain(prompts))).stdout).unwrap()
    };
    assert_eq!(run(&[one, two].concat()), run(&one) + &run(&two));
}

#[test]
fn token_ids_need_no_tokenizer() {
    let Some((model, prompt)) = recorded_model("Dream") else { return };
    let flags = format!("generate --gen-length 16 --prompt-ids {}", ids(&prompt));
    let plain = done(dllm_with(&model, &flags));
    let tokens: Vec<u32> = text(&plain.stdout).trim_end().split(',').map(|id| id.parse().unwrap()).collect();
    let json = json_with(&model, &format!("{flags} --json"));
    assert_eq!(json["text"], Value::Null);
    assert_eq!(numbers::<Vec<u32>>(&json["tokens"]), tokens);
}

/// The flags that select a recorded decode, as `options` of `tests/golden.rs`.
fn golden_flags(case: &Value) -> Vec<String> {
    let (algorithm, params) = (case["algorithm"].as_str().unwrap(), &case["params"]);
    let alg = params["alg"].as_str().unwrap_or_default();
    let mut flags: Vec<String> = Vec::new();
    let mut flag = |name: &str, value: &dyn std::fmt::Display| flags.push(format!("--{name}={value}"));
    flag("gen-length", &params["gen_length"]);
    flag("block-length", params.get("block_length").unwrap_or(&params["gen_length"]));
    flag("steps", &params["steps"]);
    let cache = match algorithm {
        "fast_dllm.generate_with_prefix_cache" => "prefix",
        "fast_dllm.generate_with_dual_cache" => "dual",
        "fast_dllm.dream_block" if params["dual_cache"] == true => "dual",
        "fast_dllm.dream_block" => "prefix",
        "dllm_cache.llada" | "dllm_cache.dream" => "adaptive",
        _ => "none",
    };
    flag("cache", &cache);
    match (&params["threshold"], &params["factor"]) {
        (_, factor @ Value::Number(_)) => {
            flag("policy", &"factor");
            flag("factor", factor);
        }
        // Dream records its default threshold with every rule; only this one uses it.
        (threshold @ Value::Number(_), _) if alg.is_empty() || alg == "confidence_threshold" => {
            flag("policy", &"threshold");
            flag("threshold", threshold);
        }
        _ => flag("policy", &"fixed"),
    }
    let confidence = match alg {
        "topk_margin" => "margin",
        "entropy" => "entropy",
        _ => "probability",
    };
    flag("confidence", &confidence);
    for (name, key) in [
        ("cfg-scale", "cfg_scale"),
        ("eps", "eps"),
        ("prompt-interval", "prompt_interval_steps"),
        ("response-interval", "gen_interval_steps"),
        ("refresh-ratio", "transfer_ratio"),
    ] {
        if let Some(value) = params.get(key) {
            flag(name, value);
        }
    }
    for prompt in numbers::<Vec<Vec<u32>>>(&case["prompt"]) {
        flag("prompt-ids", &ids(&prompt));
    }
    flags
}

#[test]
fn traces_are_the_golden_trajectories() {
    let dir = tempfile::tempdir().unwrap();
    for name in recorded::names("trajectory") {
        let want = recorded::json(&name);
        let file = dir.path().join(format!("{name}.json"));
        let mut command = dllm_with(&golden_dir().join(want["model"].as_str().unwrap()), "generate --json");
        command.arg("--trace").arg(&file).args(golden_flags(&want));
        let printed: Value = serde_json::from_slice(&done(command).stdout).unwrap();
        let got: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        recorded::compare_traces(&name, &got, &want);
        assert_eq!(got["model"], want["model"]);
        assert_eq!(printed["nfe"], want["nfe"]);
        let batch = want["final"].as_array().unwrap();
        let tokens = if batch.len() == 1 { &batch[0] } else { &want["final"] };
        assert_eq!(&printed["tokens"], tokens, "{name}");
    }
}

/// The tests that read recordings, on other recordings than the shipped ones.
#[test]
fn recordings_elsewhere() {
    let tests = ["a_ragged_batch_gives", "token_ids_need_no", "traces_are_the_golden", "a_text_needs_a_tokenizer"];
    crate::common::copy::check_elsewhere(8, &tests);
}

#[test]
fn a_text_needs_a_tokenizer() {
    let Some((model, _)) = recorded_model("llada") else { return };
    let output = dllm_with(&model, "generate --prompt a").output().unwrap();
    let said = text(&output.stderr);
    assert!(output.status.code() == Some(2) && said.starts_with("error: --prompt-ids: "), "{said}");
    assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
}

#[test]
fn wrong_calls_name_the_flag() {
    let calls = [
        (2, "generate --nonsense", "--nonsense"),
        (2, "generate --cache sometimes", "--cache"),
        (2, "generate --policy best", "--policy"),
        (2, "generate --gen-length 0", "error: --gen-length: "),
        (2, "generate --gen-length many", "--gen-length"),
        (2, "generate --gen-length 64 --block-length 24", "error: --block-length: "),
        (2, "generate --gen-length 100000", "error: --prompt: "),
        (2, "generate --steps 3 --policy fixed", "error: --steps: "),
        (2, "generate --threshold 1.5", "error: --threshold: "),
        (2, "generate --policy factor --factor -1", "error: --factor: "),
        (2, "generate --temperature -0.5", "error: --temperature: "),
        (2, "generate --temperature NaN", "error: --temperature: "),
        (2, "generate --top-p 0", "error: --top-p: "),
        (2, "generate --top-k 0", "error: --top-k: "),
        (2, "generate --cache adaptive --prompt-interval 0", "error: --prompt-interval: "),
        (2, "generate --cache adaptive --response-interval 0", "error: --response-interval: "),
        (2, "generate --cache adaptive --refresh-ratio 1.1", "error: --refresh-ratio: "),
        (2, "generate --cache adaptive --refresh-ratio -0.1", "error: --refresh-ratio: "),
        (2, "eval --setting cache=adaptive,refresh-ratio=NaN", "error: --refresh-ratio: "),
        (2, "generate --cache adaptive --cfg-scale 1 --cfg-interval 0", "error: --cfg-interval: "),
        (2, "generate --refresh-prompt-every 0", "error: --refresh-prompt-every: "),
        (2, "generate --refresh-rows 1.5", "error: --refresh-ratio: "),
        (2, "inspect --shape mid --refresh-ratio -1", "error: --refresh-ratio: "),
        (2, "bench --refresh-prompt-every 0", "error: --refresh-prompt-every: "),
        (2, "generate --suffix-window 8 --refresh-ratio 0.5", "found refresh-ratio 0.5"),
        (2, "generate --suffix-stride 4", "--suffix-stride"),
        (2, "generate --refresh-ratio 0.5 --refresh-rows 0.5", "--refresh-ratio"),
        (2, "eval --setting cache=adaptive,suffix-window=8", "found cache adaptive"),
        (2, "generate --vicinity=-1", "--vicinity"),
        (2, "generate --preset gsm8k", "dllm presets"),
        (2, "generate --preset gsm8k-dream-base --prompt-ids 1", "error: --preset: expected one for LLaDA"),
        (2, "eval --setting preset=gsm8k-dream-base", "error: --preset: expected one for LLaDA"),
        (2, "generate --threads 0", "--threads"),
        (2, "generate --device tpu", "--device"),
        (2, "generate --prompt-ids 1,two", "--prompt-ids"),
        (2, "generate --prompt-ids 1 --prompt a", "--prompt"),
        (2, "generate --prompt-ids 1 --chat", "--chat"),
        (2, "generate --prompt-ids 99999", "99999"),
        (2, "eval --setting cache=dual,colour=red", "error: --setting: "),
        (2, "eval --limit 2 --setting top-p=2", "error: --top-p: "),
        (2, "eval --limit 0", "--limit"),
        (2, "eval --limit 1 --threads 4097", "--threads"),
        (2, "inspect --shape mid --prompt-length 0", "--prompt-length"),
        (2, "inspect --shape mid --threads 4097", "--threads"),
        (2, "bench --prompt-length 0", "--prompt-length"),
        (2, "bench --gen-length 100000", "error: --prompt-length: "),
        (2, "bench --prompt-ids 99999", "error: --prompt-ids: "),
        (2, "bench --threads 4097", "--threads"),
        (2, "no-such-command", "no-such-command"),
        (1, "generate --device cuda:0", "error: --device cuda"),
        (1, "generate --model no/such/dir", "error: no/such/dir"),
        (1, "generate --prompt-file no/such/file", "error: no/such/file"),
        (1, "generate --trace no/such/dir/file.json", "error: no/such/dir/file.json"),
        (1, "generate --trace tests", "tests: expected a file"),
        (1, "eval --plot no/such/dir/plot.svg", "error: no/such/dir/plot.svg"),
        (1, "eval --plot tests", "tests: expected a file"),
        (1, "eval --problems no/such/file", "error: no/such/file"),
        (1, "eval --problems Cargo.toml", "error: Cargo.toml: line 1: "),
    ];
    for (status, line, message) in calls {
        let output = run(&mut dllm(words(line)));
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "dllm {line}: {said}");
        assert!(said.starts_with("error: ") && said.contains(message), "dllm {line}: {said}");
        assert!(output.stdout.is_empty(), "dllm {line}: {}", text(&output.stdout));
    }
}

/// A preset is equivalent to the flags of its row in the list, and other flags override them.
#[test]
fn presets() {
    let list = json_of("presets --json");
    let preset = list["presets"].as_array().unwrap().iter().find(|p| p["name"] == "gsm8k-llada-instruct").unwrap();
    assert_eq!(preset["lengths"], serde_json::json!([8, 256, 256]));
    let shown = done(dllm(words("presets")));
    assert!(text(&shown.stdout).contains("gsm8k-dream-base") && text(&shown.stdout).contains("Source: "));
    let [Some((model, prompt)), Some((dream, dream_prompt))] = ["llada", "Dream"].map(recorded_model) else { return };
    let [prompt, dream_prompt] = [prompt, dream_prompt].map(|ids_of| format!("--prompt-ids {} --json", ids(&ids_of)));
    let by_name = json_with(&model, &format!("generate --preset gsm8k-llada-instruct --gen-length 32 {prompt}"));
    let flags = "--cache adaptive --policy fixed --prompt-interval 50 --response-interval 7 --refresh-ratio 0.25";
    let by_flags = json_with(&model, &format!("generate {flags} --block-length 8 --gen-length 32 {prompt}"));
    assert_eq!((&by_name["tokens"], &by_name["nfe"]), (&by_flags["tokens"], &by_flags["nfe"]));
    // Dream's loop has no blocks, whatever the length.
    let by_name = json_with(
        &dream,
        &format!("generate --preset gsm8k-dream-base --gen-length 64 --refresh-ratio 0.5 {dream_prompt}"),
    );
    let by_flags = |interval: usize| {
        let flags = "--cache adaptive --policy fixed --prompt-interval 100 --refresh-ratio 0.5 --gen-length 64 \
                     --temperature 0.2 --top-p 0.95 --confidence entropy";
        json_with(&dream, &format!("generate {flags} --block-length 64 --response-interval {interval} {dream_prompt}"))
    };
    assert_eq!(by_name["tokens"], by_flags(8)["tokens"]);
    assert_ne!(by_name["tokens"], by_flags(1)["tokens"]);
    // Flags without effect are noted, also those of settings.
    let said = |line: &str| text(&run(&mut dllm(words(line))).stderr).to_string();
    let idle = said("generate --preset gsm8k-llada-base --cache dual --gen-length 32 --prompt-ids 1");
    assert!(idle.contains("note: --preset (see --cache) has no effect here"), "{idle}");
    let idle = said("eval --limit 1 --gen-length 8 --setting cache=none,refresh-ratio=0.5");
    assert!(idle.contains("note: cache=none,refresh-ratio=0.5: --refresh-ratio (see --cache) has no effect"), "{idle}");
    let idle = said("eval --limit 1 --gen-length 8 --setting cache=dual,response-interval=5");
    assert!(
        idle.contains("note: cache=dual,response-interval=5: --response-interval (see --cache) has no effect"),
        "{idle}"
    );
}

#[test]
fn without_a_checkpoint_it_asks_for_one() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("dllm");
    std::fs::copy(env!("CARGO_BIN_EXE_dllm"), &program).unwrap();
    let output = run(Command::new(&program).current_dir(dir.path()));
    assert_eq!(output.status.code(), Some(2));
    let said = text(&output.stderr);
    assert!(said.starts_with("error: --model: expected a checkpoint directory, found none: "), "{said}");
    for part in ["no models/tiny-math in the current directory or above", "Clone the repository", "pass --model DIR"] {
        assert!(said.contains(part), "{part:?} in {said}");
    }

    // The sample model above the executable is found from any directory.
    let models = dir.path().join("models/tiny-math");
    std::fs::create_dir_all(&models).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(root().join("models/tiny-math").join(name), models.join(name)).unwrap();
    }
    let elsewhere = tempfile::tempdir().unwrap();
    let output = run(Command::new(&program).current_dir(elsewhere.path()));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    // This copy has no problem file; the built-in sample question is the same.
    assert_eq!(output.stdout, done(dllm::<&str>([])).stdout);
}

#[test]
fn help_and_version_go_to_stdout() {
    for (line, wanted) in [
        ("--help", "Examples:"),
        ("--version", env!("CARGO_PKG_VERSION")),
        ("generate --help", "[default: 128]"),
        ("generate --help", "none, prefix, dual or adaptive"),
        ("inspect --help", "- prefix: "),
        ("inspect -h", "none, prefix, dual, adaptive"),
        ("inspect -h", "llada-8b, dream-7b, mid"),
        ("eval --help", "--setting"),
    ] {
        let output = done(dllm(words(line)));
        // Help is wrapped to the width of the terminal.
        let shown = words(text(&output.stdout)).join(" ");
        assert!(shown.contains(wanted) && output.stderr.is_empty(), "dllm {line}: {shown}");
    }
}

#[test]
fn a_closed_pipe_is_not_an_error() {
    for line in ["generate --gen-length 64", "generate --gen-length 64 --json", "--help", "eval --limit 1"] {
        let child = Process::spawn(dllm(words(line)).stdout(Stdio::piped()).stderr(Stdio::piped()));
        drop(child.stdout());
        let output = child.output();
        assert_eq!(output.status.code(), Some(0), "dllm {line}: {}", text(&output.stderr));
        assert!(!text(&output.stderr).contains("error"), "dllm {line}: {}", text(&output.stderr));
    }
}

#[test]
fn a_reader_that_leaves_ends_the_decode() {
    // Sixteen blocks, one forward a token: the pipe is found closed after the first block.
    let line = "generate --gen-length 512 --policy fixed --trace";
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("trace.json");
    let child = Process::spawn(dllm(words(line)).arg(&file).stdout(Stdio::piped()).stderr(Stdio::null()));
    let mut byte = [0];
    child.stdout().read_exact(&mut byte).unwrap();
    assert_eq!(child.wait().code(), Some(0));
    let trace: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert!(numbers::<usize>(&trace["nfe"]) < 512, "{}", trace["nfe"]);
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_with_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("trace.json");
    let line = "generate --gen-length 512 --policy fixed --cache none --watch --trace";
    let child = Process::spawn(dllm(words(line)).arg(&file).stdout(Stdio::piped()).stderr(Stdio::piped()));
    let mut stderr = BufReader::new(child.stderr());
    for _ in 0..3 {
        stderr.read_line(&mut String::new()).unwrap();
    }
    child.interrupt();
    let mut said = String::new();
    stderr.read_to_string(&mut said).unwrap();
    let output = child.output();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("interrupted with "), "{said}");
    let answer = text(&output.stdout);
    assert!(answer.ends_with('\n') && !answer.contains("mask"), "{answer:?}");

    let trace: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let steps = trace["steps"].as_array().unwrap();
    assert!(steps.len() >= 3 && steps.len() < 512, "{} steps", steps.len());
    assert_eq!(trace["nfe"], steps.len());
    assert_eq!(trace["final"], steps.last().unwrap()["x_after"]);
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["trace.json"], "nothing but the trace");
}

#[cfg(unix)]
#[test]
fn a_second_ctrl_c_ends_at_once() {
    // The pipe of the trace has no reader, so that the program waits.
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let line = "generate --gen-length 64 --watch --trace";
    let child = Process::spawn(dllm(words(line)).arg(&pipe).stdout(Stdio::null()).stderr(Stdio::piped()));
    let mut stderr = BufReader::new(child.stderr());
    stderr.read_line(&mut String::new()).unwrap();
    std::thread::spawn(move || stderr.read_to_end(&mut Vec::new()));
    let status = loop {
        child.interrupt();
        std::thread::sleep(std::time::Duration::from_millis(100));
        if let Some(status) = child.try_wait() {
            break status;
        }
    };
    assert_eq!((status.code(), child.wait().code()), (Some(130), Some(130)));
}

#[test]
fn a_trace_that_cannot_be_written_is_found_before_the_work() {
    let output = run(&mut dllm(words("generate --watch --trace no/such/dir/t.json")));
    assert_eq!(output.status.code(), Some(1));
    assert!(!text(&output.stderr).contains("step"), "{}", text(&output.stderr));
    // An existing file is kept when the arguments are wrong.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("trace.json");
    std::fs::write(&file, "old").unwrap();
    let output = run(dllm(words("generate --top-k 0 --trace")).arg(&file));
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "old");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// A full device is found only when the trace is written.
#[cfg(target_os = "linux")]
#[test]
fn a_trace_that_is_lost_does_not_cost_the_answer() {
    let line = "generate --gen-length 64";
    let output = run(dllm(words(line)).args(["--trace", "/dev/full"]));
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("NFE ") && said.contains("error: /dev/full"), "{said}");
    assert_eq!(output.stdout, done(dllm(words(line))).stdout);
}

#[test]
fn a_panic_in_the_tokenizer_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(root().join("models/tiny-math").join(name), dir.path().join(name)).unwrap();
    }
    let file = dir.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    tokenizer["pre_tokenizer"] = serde_json::json!({"type": "FixedLength", "length": 0});
    std::fs::write(&file, tokenizer.to_string()).unwrap();
    let output = run(dllm(["generate", "--prompt", "hello", "--model"]).arg(dir.path()));
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let others: Vec<_> = said.lines().filter(|line| !line.starts_with("error: ")).collect();
    assert!(said.contains("tokenizer.json: ") && said.contains("panicked"), "{said}");
    assert!(others.is_empty(), "{others:?}");
}

/// Sends Ctrl-C to `bench` when the first `words` are on stderr; its output, and the rest of stderr.
#[cfg(unix)]
fn bench_interrupted(mut command: Command, words: &str) -> (Output, String) {
    let child = Process::spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let mut stderr = BufReader::new(child.stderr());
    let mut line = String::new();
    while !line.contains(words) {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "no {words:?}");
    }
    child.interrupt();
    let mut said = String::new();
    stderr.read_to_string(&mut said).unwrap();
    (child.output(), said)
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_bench_with_its_complete_rounds() {
    let line = "bench --repeat 1000 --gen-length 32 --modes vanilla,dual-fixed --json";
    let mut command = dllm(words(line));
    command.env_remove("DLLM_ORIGINALS");
    let (output, said) = bench_interrupted(command, "round 1 of");
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("interrupted after round "), "{said}");
    let results: Value = serde_json::from_slice(&output.stdout).unwrap();
    let rounds: usize = numbers(&results["rounds"]);
    assert!((1..1000).contains(&rounds), "{rounds}");
    for mode in results["modes"].as_array().unwrap() {
        assert_eq!(numbers::<Vec<f64>>(&mode["seconds"]).len(), rounds);
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_the_originals_of_bench() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let python = dir.path().join("python");
    std::fs::write(&python, "#!/bin/sh\nexec sleep 600\n").unwrap();
    std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = dllm(words("bench --gen-length 32 --modes vanilla --json"));
    command.env("DLLM_ORIGINALS", dir.path()).env("DLLM_PYTHON", &python);
    let start = std::time::Instant::now();
    let (output, said) = bench_interrupted(command, "round 1 of");
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(start.elapsed().as_secs() < 300);
    let results: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(results["rounds"], 1);
    assert_eq!(results["originals"], "not measured: interrupted");
}

#[test]
fn eval_compares_settings() {
    let rows = json_of("eval --limit 2 --gen-length 64 --json --setting cache=dual --setting cache=none,threshold=0.5");
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for (row, setting) in rows.iter().zip(["cache=dual", "cache=none,threshold=0.5"]) {
        assert_eq!(row["setting"], setting);
        assert_eq!(row["problems"], 2);
        let accuracy: f64 = numbers(&row["accuracy"]);
        assert!([0.0, 0.5, 1.0].contains(&accuracy), "{row}");
        let nfe: f64 = numbers(&row["nfe"]);
        assert!((1.0..64.0).contains(&nfe) && numbers::<f64>(&row["tokens_per_second"]) > 0.0, "{row}");
    }
    let table = done(dllm(words("eval --limit 1 --gen-length 64 --setting cache=dual,policy=fixed,steps=32")));
    let lines: Vec<&str> = text(&table.stdout).lines().collect();
    assert_eq!(lines.len(), 2, "{lines:?}");
    assert!(lines[0].contains("accuracy") && lines[1].starts_with("cache=dual,policy=fixed,steps=32"), "{lines:?}");
    assert!(lines[1].contains(" 32.0 "), "{lines:?}");
}

/// Whether tags and attributes are those of well-formed XML, as far as the program writes it: no comments, no CDATA.
fn check_xml(xml: &str) {
    let check_text = |text: &str| {
        for entity in text.split('&').skip(1) {
            let name = entity.split(';').next().unwrap();
            assert!(["lt", "gt", "amp", "quot", "apos"].contains(&name), "&{entity:.20} in {xml}");
        }
        assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
    };
    let mut open = Vec::new();
    let mut roots = 0;
    let (before, rest) = xml.split_once('<').unwrap();
    assert!(before.trim().is_empty(), "{before}");
    for piece in rest.split('<') {
        let (tag, text) = piece.split_once('>').unwrap_or_else(|| panic!("<{piece}"));
        check_text(text);
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "</{name}>");
        } else {
            let (tag, empty) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
            let (name, attributes) = tag.split_once(' ').unwrap_or((tag, ""));
            assert!(!name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric()), "<{tag}>");
            let parts: Vec<&str> = attributes.split('"').collect();
            assert!(parts.len() % 2 == 1 && parts[parts.len() - 1].is_empty(), "<{tag}>");
            let mut names = std::collections::HashSet::new();
            for pair in parts.chunks_exact(2) {
                let name = pair[0].trim_start().strip_suffix('=').unwrap_or_else(|| panic!("<{tag}>"));
                assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') && names.insert(name), "<{tag}>");
                check_text(pair[1]);
            }
            roots += usize::from(open.is_empty());
            if !empty {
                open.push(name);
            }
        }
        assert!(!open.is_empty() || text.trim().is_empty(), "{text:?} outside of the root");
    }
    assert!(open.is_empty() && roots == 1, "{open:?}, {roots} roots");
}

#[test]
fn eval_draws_settings_and_counts_their_work() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("plot.svg");
    let settings = ["cache=dual", "cache=none,policy=fixed", "policy=threshold, cache=dual"];
    let mut command = dllm(words("eval --limit 2 --gen-length 32 --json --plot"));
    command.arg(&file).args(settings.iter().flat_map(|setting| ["--setting", setting]));
    let rows: Value = serde_json::from_slice(&done(command).stdout).unwrap();
    let work: Vec<f64> = (0..settings.len()).map(|i| numbers(&rows[i]["multiply_adds"])).collect();
    assert!(work[0] > 0.0 && work[0] == work[2] && work[1] > work[0], "{work:?}");

    let svg = std::fs::read_to_string(&file).unwrap();
    check_xml(&svg);
    assert_eq!(svg.matches("<g class=\"point").count(), settings.len());
    let labels: Vec<&str> = svg.split("<text class=\"label\"").skip(1).collect();
    assert_eq!(labels.len(), settings.len());
    for (label, setting) in labels.iter().zip(settings) {
        assert!(label.contains(&format!(">{setting}</tspan></text>")), "{label}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_eval_its_plot() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("plot.svg");
    let mut command = dllm(words("eval --gen-length 32 --limit 1 --plot"));
    let endless = std::iter::repeat_n(["--setting", "cache=none,policy=fixed"], 1000);
    command.arg(&file).args(endless.flatten());
    let child = Process::spawn(command.stdout(Stdio::piped()).stderr(Stdio::null()));
    let mut lines = BufReader::new(child.stdout()).lines();
    // The head, and the first setting.
    assert!(lines.by_ref().take(2).all(|line| line.is_ok()));
    child.interrupt();
    let finished = 1 + lines.count();
    assert_eq!(child.wait().code(), Some(0));
    assert!(finished < 1000);
    let svg = std::fs::read_to_string(&file).unwrap();
    check_xml(&svg);
    assert_eq!(svg.matches("<g class=\"point").count(), finished);
}

/// Mode flags without `--setting` are one setting, and replace the six default settings.
#[test]
fn eval_takes_mode_flags() {
    let rows = json_of("eval --limit 1 --gen-length 64 --json --cache none --threshold 0.5");
    assert_eq!(rows.as_array().unwrap().len(), 1);
    assert_eq!(rows[0]["setting"], "cache=none,policy=threshold,threshold=0.5");
}

/// Hybrid caches by their flags: name of a setting, trace, and flags without effect.
#[test]
fn hybrid_caches() {
    let rows = json_of("eval --limit 1 --gen-length 32 --json --refresh-rows 0.5");
    assert_eq!(rows[0]["setting"], "cache=dual,policy=threshold,threshold=0.9,refresh-ratio=0.5");

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("trace.json");
    let line = "generate --gen-length 32 --block-length 8 --policy fixed --refresh-prompt-every 2 --vicinity 3 \
                --suffix-window 8 --prompt-ids 905,908,17,4 --trace";
    let mut command = dllm(words(line));
    command.arg(&file);
    done(command);
    let trace: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(trace["algorithm"], "fast_dllm.generate_with_dual_cache, joined");
    let params = &trace["params"];
    assert_eq!([&params["refresh_prompt_every"], &params["vicinity"], &params["suffix_window"]], [2, 3, 8]);
    let steps = trace["steps"].as_array().unwrap();
    let passes: Vec<(&str, [usize; 2])> =
        steps.iter().map(|step| (step["kind"].as_str().unwrap(), numbers(&step["window"]))).collect();
    // 4 + 32 positions, of which the window ends 8 positions after the block.
    assert_eq!((passes[0], passes[1]), (("full", [0, 20]), ("block", [1, 15])));
    assert_eq!((passes[8], passes[9]), (("response", [4, 28]), ("block", [9, 23])));
    assert_eq!((passes[16], passes[17]), (("full", [0, 36]), ("block", [17, 31])));

    let said = |line: &str| text(&run(&mut dllm(words(line))).stderr).to_string();
    let idle = said("generate --gen-length 8 --prompt-ids 1 --cache none --vicinity 2 --refresh-ratio 0.5");
    for flag in ["--vicinity (see --cache)", "--refresh-ratio (see --cache)"] {
        assert!(idle.contains(&format!("note: {flag} has no effect here")), "{idle}");
    }
    assert!(!said("generate --gen-length 8 --prompt-ids 1 --vicinity 2").contains("no effect"));
}

/// On one terminal or in one file, the answer follows the lines of the steps.
#[test]
fn the_answer_follows_the_steps() {
    let log = tempfile::NamedTempFile::new().unwrap();
    // Like 2>&1. Both append, so that neither overwrites the other.
    let append = || std::fs::OpenOptions::new().append(true).open(log.path()).unwrap();
    assert!(Process::spawn(dllm([""; 0]).stdout(append()).stderr(append())).wait().success());
    let said = std::fs::read_to_string(log.path()).unwrap();
    let last_step = said.lines().filter(|l| l.starts_with("step")).count();
    let answer = said.find("\nEva has").unwrap();
    assert!(last_step > 2 && said[answer..].contains("#### 38\nNFE"), "{said}");
    assert!(!said[answer..].contains("\nstep"), "{said}");
}

#[test]
fn an_unknown_instruction_set_is_named() {
    let output = run(dllm(["generate"]).env("DLLM_CPU", "scalar"));
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("DLLM_CPU: expected amx, avx512, avx2 or plain, found \"scalar\""));
}

#[test]
fn eval_names_the_bad_row() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("problems.jsonl");
    let good = r#"{"prompt": "a", "answer": "1"}"#;
    let long = format!(r#"{{"prompt": "{}", "answer": "1"}}"#, "1 2 ".repeat(2000));
    for (bad, message) in [
        ("{", "EOF"),
        (r#"{"prompt": "a"}"#, "\"answer\""),
        (r#"{"prompt": 5, "answer": "1"}"#, "\"prompt\""),
        (r#"{"prompt": "", "answer": "1"}"#, "empty prompt"),
        (long.as_str(), "positions"),
    ] {
        std::fs::write(&file, format!("{good}\n\n{bad}\n")).unwrap();
        let output = run(dllm(["eval", "--problems"]).arg(&file));
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("problems.jsonl: line 3: ") && said.contains(message), "{said}");
    }
}

/// A hanging child fails its test with the command and what the child said, long before the child's own end.
#[cfg(unix)]
#[test]
fn a_hanging_child_is_killed_and_named() {
    let start = Instant::now();
    let failure = std::panic::catch_unwind(|| {
        let mut command = Command::new("sh");
        command.args(["-c", "echo working >&2; exec sleep 60"]);
        run_within(Duration::from_millis(500), &mut command)
    });
    let message = *failure.unwrap_err().downcast::<String>().unwrap();
    for part in ["killed after 500ms: ", "\"sh\" \"-c\"", "sleep 60", "its stderr: working\n"] {
        assert!(message.contains(part), "{part:?} in {message}");
    }
    assert!(start.elapsed() < Duration::from_secs(50));
}
