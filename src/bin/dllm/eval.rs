//! `dllm eval`: measures accuracy, forwards and speed of decode settings.

use crate::args::Decoding;
use crate::generate::Checkpoint;
use crate::machine::Machine;
use crate::output::{self, INTERRUPT, OutputFile};
use crate::plot::{self, Point};
use clap::Args;
use dllm_kernels::tokenizer::Tokenizer;
use dllm_kernels::{Error, Generation, Generator, Options, Policy, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Problem file in the directory of the sample model.
const PROBLEMS: &str = "eval/problems_0shot.jsonl";

/// Settings to compare by default.
const SETTINGS: [&str; 6] = [
    "cache=none,policy=fixed",
    "cache=prefix,policy=fixed",
    "cache=dual,policy=fixed",
    "cache=none,policy=threshold,threshold=0.9",
    "cache=prefix,policy=threshold,threshold=0.9",
    "cache=dual,policy=threshold,threshold=0.9",
];

const EXAMPLES: &str = "\
Examples:
  dllm eval --limit 50 --gen-length 64
  dllm eval --model DIR --problems F.jsonl --setting cache=none,policy=fixed --setting cache=dual,threshold=0.8
  dllm eval --json > results.json
  dllm eval --plot accuracy.svg
";

/// Accuracy, forward passes and speed of decode settings on a set of problems.
///
/// A problem is a line of JSON with \"prompt\" (already in the chat template) and \"answer\". It counts as solved if the
/// text after the first #### of the completion, up to the end of that line, equals the answer.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXAMPLES, verbatim_doc_comment)]
pub struct Eval {
    /// Checkpoint directory [default: models/tiny-math, in this directory or above the program]
    #[arg(long, value_name = "DIR", help_heading = "Evaluation")]
    model: Option<PathBuf>,
    /// Problem file, one JSON object per line [default: eval/problems_0shot.jsonl of the model]
    #[arg(long, value_name = "FILE", help_heading = "Evaluation")]
    problems: Option<PathBuf>,
    /// Stop after the first N problems [default: all]
    #[arg(long, value_name = "N", help_heading = "Evaluation", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Flags below as key=value, separated by commas; repeat for each setting [default: the flags of caches and policies
    /// that are given, or 3 caches x 2 policies]
    #[arg(long, value_name = "K=V,K=V", help_heading = "Evaluation")]
    setting: Vec<String>,
    /// Print a JSON list: setting, problems, accuracy, nfe, tokens_per_second, multiply_adds, per problem
    #[arg(long, help_heading = "Evaluation")]
    json: bool,
    /// Draw accuracy against tokens/s to an SVG file
    #[arg(long, value_name = "FILE.svg", help_heading = "Evaluation")]
    plot: Option<PathBuf>,
    /// Flags of all settings.
    #[command(flatten)]
    decoding: Decoding,
    /// Flags of the machine.
    #[command(flatten)]
    machine: Machine,
}

/// One line of the problem file.
struct Problem {
    line: usize,
    prompt: Vec<u32>,
    answer: String,
}

/// Sums over the problems solved with one setting.
#[derive(Default)]
struct Score {
    problems: usize,
    right: usize,
    nfe: usize,
    tokens: f64,
    elapsed: Duration,
    macs: u64,
}

impl Score {
    fn add(&mut self, generation: &Generation, right: bool) {
        self.problems += 1;
        self.right += usize::from(right);
        self.nfe += generation.nfe;
        self.tokens += generation.tokens_per_second() * generation.elapsed.as_secs_f64();
        self.elapsed += generation.elapsed;
        self.macs += generation.macs;
    }

    fn accuracy(&self) -> f64 {
        self.right as f64 / self.problems as f64
    }

    fn nfe(&self) -> f64 {
        self.nfe as f64 / self.problems as f64
    }

    fn tokens_per_second(&self) -> f64 {
        self.tokens / self.elapsed.as_secs_f64().max(1e-9)
    }

    fn macs(&self) -> f64 {
        self.macs as f64 / self.problems as f64
    }

    fn json(&self, setting: &str) -> Value {
        json!({
            "setting": setting,
            "problems": self.problems,
            "accuracy": self.accuracy(),
            "nfe": self.nfe(),
            "tokens_per_second": self.tokens_per_second(),
            "multiply_adds": self.macs(),
        })
    }

    fn point(&self, setting: &str) -> Point {
        Point {
            name: setting.to_string(),
            problems: self.problems,
            right: self.right,
            tokens_per_second: self.tokens_per_second(),
        }
    }
}

/// Runs the command.
pub fn run(args: &Eval) -> Result<()> {
    let settings = settings(args)?;
    let plot_file = args.plot.as_deref().map(OutputFile::new).transpose()?;
    let device = args.machine.start()?;
    let checkpoint = Checkpoint::open(args.model.as_deref(), &device)?;
    let Some(tokenizer) = &checkpoint.tokenizer else {
        let message = "expected tokenizer.json or vocab.json, found neither; eval needs a tokenizer".into();
        return Err(Error::Tokenizer { path: checkpoint.dir, message });
    };
    let file = args.problems.clone().unwrap_or_else(|| checkpoint.dir.join(PROBLEMS));
    let limit = args.limit.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX));
    let problems = read_problems(&file, tokenizer, limit)?;
    for (name, decoding) in &settings {
        decoding.check_family(checkpoint.model.config().family)?;
        for flag in decoding.idle_flags() {
            output::note(format_args!("note: {name}: {flag} has no effect here"));
        }
    }
    let settings: Vec<(String, Options)> = settings
        .into_iter()
        .map(|(name, decoding)| (name, Options { end_tokens: checkpoint.end_tokens.clone(), ..decoding.options() }))
        .collect();
    for (name, options) in &settings {
        check(&checkpoint, &file, &problems, name, options)?;
    }
    let mut scores = Vec::new();
    let printed = compare(&checkpoint, tokenizer, &problems, &settings, args.json, &mut scores);
    // A reader of stdout that has gone is no error: the plot shows the finished settings.
    let done = printed.as_ref().map_or_else(output::is_closed_pipe, |()| true);
    if let Some(file) = plot_file.filter(|_| done && !scores.is_empty()) {
        let points: Vec<Point> = scores.iter().map(|(name, score)| score.point(name)).collect();
        file.write(&plot::svg(&points))?;
    }
    printed
}

/// Runs each setting, prints its score and appends it to `scores`. After Ctrl-C only the finished problems count.
fn compare<'s>(
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
    problems: &[Problem],
    settings: &'s [(String, Options)],
    json: bool,
    scores: &mut Vec<(&'s str, Score)>,
) -> Result<()> {
    let width = settings.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0).max("setting".len());
    if !json {
        let line = format!("{:width$}  problems  accuracy  NFE/problem  G MAC/problem  tokens/s\n", "setting");
        output::print(&line)?;
    }
    output::catch_interrupts();
    for (name, options) in settings {
        let score = score(checkpoint, tokenizer, problems, name, options)?;
        if score.problems > 0 {
            let row = table_row(name, width, &score);
            scores.push((name, score));
            if !json {
                output::print(&row)?;
            }
        }
        if output::interrupted() {
            output::note(format_args!("interrupted"));
            break;
        }
    }
    let rows = || scores.iter().map(|(name, score)| score.json(name)).collect::<Vec<_>>();
    if json { output::print(&format!("{}\n", Value::from(rows()))) } else { Ok(()) }
}

fn table_row(name: &str, width: usize, score: &Score) -> String {
    format!(
        "{name:width$}  {:8}  {:8.3}  {:11.1}  {:13.3}  {:8.1}\n",
        score.problems,
        score.accuracy(),
        score.nfe(),
        score.macs() / 1e9,
        score.tokens_per_second()
    )
}

/// Returns the name and flags of every setting: those of the command line, overridden by the setting.
fn settings(args: &Eval) -> Result<Vec<(String, Decoding)>> {
    let given: Vec<&str> = if !args.setting.is_empty() {
        args.setting.iter().map(String::as_str).collect()
    } else if args.decoding.chooses_mode() {
        // The default settings would override these flags, so they are a setting of their own.
        vec![""]
    } else {
        SETTINGS.to_vec()
    };
    let setting = |s: &str| {
        let decoding = args.decoding.with_setting(s)?;
        Ok((if s.is_empty() { mode(&decoding.options()) } else { s.to_string() }, decoding))
    };
    given.into_iter().map(setting).collect()
}

/// Returns the name of a setting: cache, policy, and the options of caches that differ from their defaults.
fn mode(options: &Options) -> String {
    let mut name = format!("cache={},policy={}", options.cache, options.policy.name());
    match options.policy {
        Policy::Threshold(threshold) => name += &format!(",threshold={threshold}"),
        Policy::Factor(factor) => name += &format!(",factor={factor}"),
        _ => {}
    }
    let default = Options { cache: options.cache, ..Options::default() };
    for (flag, value, usual) in [
        ("prompt-interval", options.prompt_interval as f64, default.prompt_interval as f64),
        ("response-interval", options.response_interval as f64, default.response_interval as f64),
        ("refresh-ratio", options.effective_refresh_ratio(), default.effective_refresh_ratio()),
        ("refresh-prompt-every", options.refresh_prompt_every as f64, 1.0),
        ("vicinity", options.vicinity as f64, 0.0),
        ("cfg-interval", options.cfg_interval as f64, 1.0),
    ] {
        if value != usual {
            name += &format!(",{flag}={value}");
        }
    }
    match options.suffix_window {
        Some(window) => name + &format!(",suffix-window={window}"),
        None => name,
    }
}

/// Checks, before the work, that the options and all problems fit the model.
///
/// # Errors
/// [`Error::Argument`] for an option, [`Error::Format`] for a problem.
fn check(checkpoint: &Checkpoint, file: &Path, problems: &[Problem], name: &str, options: &Options) -> Result<()> {
    for problem in problems {
        let fits = options.validate(checkpoint.model.config(), std::slice::from_ref(&problem.prompt));
        fits.map_err(|error| match error {
            Error::Argument { name: "prompt", expected, found } => {
                bad_row(file, problem.line, &format!("prompt: expected {expected}, found {found}"))
            }
            Error::Argument { name: flag, expected, found } => {
                Error::Argument { name: flag, expected, found: format!("{found} (setting {name:?})") }
            }
            other => other,
        })?;
    }
    Ok(())
}

/// Solves the problems with one setting, one at a time.
fn score(
    checkpoint: &Checkpoint,
    tokenizer: &Tokenizer,
    problems: &[Problem],
    name: &str,
    options: &Options,
) -> Result<Score> {
    let generator = Generator::new(&checkpoint.model).options(options.clone()).interrupt(&INTERRUPT);
    // Draws nothing unless stderr is a terminal.
    let bar = ProgressBar::new(problems.len() as u64).with_message(name.to_string());
    if let Ok(style) = ProgressStyle::with_template("{msg}  {pos}/{len}  {wide_bar}  {eta}") {
        bar.set_style(style);
    }
    let mut score = Score::default();
    for problem in problems {
        let generation = generator.generate(std::slice::from_ref(&problem.prompt))?;
        // An interrupted decode has no answer.
        if generation.interrupted {
            break;
        }
        let completion = tokenizer.decode(&generation.tokens[0])?;
        score.add(&generation, final_answer(&completion) == Some(problem.answer.as_str()));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(score)
}

/// Returns the answer in a completion: the rest of the line after the first `####`.
fn final_answer(completion: &str) -> Option<&str> {
    let (_, after) = completion.split_once("####")?;
    Some(after.lines().next().unwrap_or_default().trim())
}

fn bad_row(file: &Path, line: usize, message: &str) -> Error {
    Error::Format { path: file.to_path_buf(), message: format!("line {line}: {message}") }
}

fn read_problems(file: &Path, tokenizer: &Tokenizer, limit: usize) -> Result<Vec<Problem>> {
    let rows = std::fs::read_to_string(file).map_err(output::io_error(file))?;
    let lines = rows.lines().enumerate().filter(|(_, row)| !row.trim().is_empty()).take(limit);
    let problems = lines.map(|(i, row)| read_problem(file, tokenizer, i + 1, row)).collect::<Result<Vec<_>>>()?;
    if problems.is_empty() {
        return Err(bad_row(file, 1, "expected a JSON object with \"prompt\" and \"answer\", found an empty file"));
    }
    Ok(problems)
}

fn read_problem(file: &Path, tokenizer: &Tokenizer, line: usize, row: &str) -> Result<Problem> {
    let row: Value = serde_json::from_str(row).map_err(|e| bad_row(file, line, &e.to_string()))?;
    let field = |key: &str| match &row[key] {
        Value::String(value) => Ok(value.clone()),
        Value::Null => Err(bad_row(file, line, &format!("expected a string \"{key}\", found none"))),
        other => Err(bad_row(file, line, &format!("expected a string \"{key}\", found {other:.80}"))),
    };
    let (prompt, answer) = (field("prompt")?, field("answer")?);
    Ok(Problem { line, prompt: tokenizer.encode(&prompt, false)?, answer })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::tests::{DECODING, fields, last_name, parse, same};
    use crate::machine::Device;

    #[test]
    fn every_flag_sets_its_field() {
        fields::<Eval>(
            "",
            &[
                ("--model=dir", |e| e.model = Some("dir".into())),
                ("--problems=file", |e| e.problems = Some("file".into())),
                ("--limit=3", |e| e.limit = Some(3)),
                ("--setting=a=1,b --setting=c", |e| e.setting = vec!["a=1,b".into(), "c".into()]),
                ("--device=cuda", |e| e.machine.device = Some(Device::Cuda(0))),
                ("--threads=5", |e| e.machine.threads = Some(5)),
                ("--json", |e| e.json = true),
                ("--plot=file", |e| e.plot = Some("file".into())),
            ],
        );
    }

    /// Every flag of a decode reaches the settings: those of a cache or policy make one setting, whose name says what they are;
    /// others apply to the six default settings, and all to those of `--setting`.
    #[test]
    fn every_flag_reaches_the_settings() {
        for row in DECODING {
            let of = |line: &str| settings(&parse::<Eval>(line)).unwrap();
            let mut want = Options::default();
            (row.change)(&mut want);
            let found = of(row.line);
            if row.chooses_mode {
                assert_eq!(found.len(), 1, "{}", row.line);
                same(row.line, &found[0].1.options(), &want);
                // The name is a setting of its own. It has no flags of sampling, as a preset has.
                if last_name(row.line) != "preset" {
                    let named = Decoding::default().with_setting(&found[0].0).unwrap();
                    let stated = Options { refresh_ratio: want.refresh_ratio, ..named.options() };
                    same(&found[0].0, &stated, &want);
                    assert_eq!(
                        named.options().effective_refresh_ratio(),
                        want.effective_refresh_ratio(),
                        "{}",
                        row.line
                    );
                }
            } else {
                assert_eq!(found.iter().map(|(name, _)| &name[..]).collect::<Vec<_>>(), SETTINGS, "{}", row.line);
                for (setting, decoding) in found {
                    let mut want = Decoding::default().with_setting(&setting).unwrap().options();
                    (row.change)(&mut want);
                    same(row.line, &decoding.options(), &want);
                }
            }
            let found = of(&format!("{} --setting=seed=7", row.line));
            assert_eq!((found.len(), &found[0].0[..]), (1, "seed=7"), "{}", row.line);
            same(row.line, &found[0].1.options(), &Options { seed: 7, ..want });
        }
    }

    #[test]
    fn a_score_sums_what_was_generated() {
        let model = dllm_kernels::Model::open("tests/golden/tiny-llada").unwrap();
        let mut score = Score::default();
        let (mut tokens, mut elapsed, mut nfe, mut macs) = (0, Duration::ZERO, 0, 0);
        for (prompt, gen_length) in [([5, 6, 7], 8), ([9, 8, 7], 16), ([1, 2, 3], 4)] {
            let options = Options { gen_length, ..Options::default() };
            let generation = Generator::new(&model).options(options).generate(&[prompt]).unwrap();
            score.add(&generation, gen_length == 16);
            // The end-of-text token counts, what follows it does not.
            tokens += gen_length.min(generation.text_tokens(0).len() + 1);
            (elapsed, nfe, macs) = (elapsed + generation.elapsed, nfe + generation.nfe, macs + generation.macs);
        }
        assert_eq!((score.problems, score.right, score.nfe, score.macs), (3, 1, nfe, macs));
        assert_eq!(score.elapsed, elapsed);
        assert!((score.tokens - tokens as f64).abs() < 1e-6, "{} tokens, expected {tokens}", score.tokens);
    }

    #[test]
    fn scores_are_means_over_the_problems() {
        let score = Score {
            problems: 8,
            right: 3,
            nfe: 100,
            tokens: 512.0,
            elapsed: Duration::from_millis(1600),
            macs: 20_000_000_000,
        };
        let want = json!({"setting": "a", "problems": 8, "accuracy": 0.375, "nfe": 12.5, "tokens_per_second": 320.0,
            "multiply_adds": 2.5e9});
        assert_eq!(score.json("a"), want);
        let row = table_row("a", 7, &score);
        assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["a", "8", "0.375", "12.5", "2.500", "320.0"]);
        let point = score.point("a");
        assert_eq!((&point.name[..], point.problems, point.right, point.tokens_per_second), ("a", 8, 3, 320.0));
    }

    #[test]
    fn the_answer_follows_the_first_mark() {
        assert_eq!(final_answer("2+2=4\n####  4 \nmore"), Some("4"));
        assert_eq!(final_answer("#### [1, 2]\n#### 3"), Some("[1, 2]"));
        assert_eq!(final_answer("####"), Some(""));
        assert_eq!(final_answer("4"), None);
    }
}
