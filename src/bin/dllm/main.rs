//! `dllm`: run, measure and inspect diffusion language models.
//!
//! Exit status: 0 done, 1 the work failed, 2 the arguments are wrong. stdout holds results, stderr everything else.

mod args;
mod bench;
mod doctor;
mod eval;
mod generate;
mod inspect;
#[cfg(test)]
#[path = "../../selftest/limit.rs"]
mod limit;
mod machine;
mod output;
mod plot;
mod presets;
mod report;
mod screen;
mod watch;

use clap::{Parser, Subcommand};
use dllm_kernels::{Error, Result, tokenizer};
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  dllm                                        the sample model answers a question, shown as it unmasks
  dllm generate --chat --prompt \"How are you?\" --model DIR
  dllm generate --help                        all flags of a decode
  dllm eval --limit 50                        accuracy and speed of caches and policies
  dllm inspect DIR                            architecture and memory of a checkpoint
  dllm doctor                                 driver, CUDA devices and a check of every kernel
";

/// Diffusion language models (LLaDA, Dream): decode, measure, inspect
///
/// Without a command, the sample model models/tiny-math of the repository answers a question.
#[derive(Parser)]
#[command(name = "dllm", version, after_help = EXAMPLES, max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Generate answers to one prompt or to a batch
    Generate(Box<generate::Generate>),
    /// Measure accuracy, forward passes and speed of decode settings on a set of problems
    Eval(Box<eval::Eval>),
    /// Show the architecture of a checkpoint and the memory that decoding needs
    Inspect(inspect::Inspect),
    /// List the settings published by dLLM-Cache, for --preset
    Presets(presets::Presets),
    /// Time the decode modes on one prompt
    Bench(bench::Bench),
    /// Show the CUDA driver and devices, and check every op against its reference
    Doctor(doctor::Doctor),
}

fn main() -> ExitCode {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        // A panic inside the tokenizer is caught and becomes an error.
        if !tokenizer::is_shielded() {
            report(info);
        }
    }));
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to stdout, whose reader may close it early.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    match run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error @ Error::Argument { .. }) => {
            output::note(format_args!("error: --{error}"));
            ExitCode::from(2)
        }
        Err(error) => {
            output::note(format_args!("error: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Option<Command>) -> Result<()> {
    match command {
        None => generate::run(&generate::Generate::demo()),
        Some(Command::Generate(args)) => generate::run(&args),
        Some(Command::Eval(args)) => eval::run(&args),
        Some(Command::Inspect(args)) => inspect::run(&args),
        Some(Command::Presets(args)) => presets::run(&args),
        Some(Command::Bench(args)) => bench::run(&args),
        Some(Command::Doctor(args)) => doctor::run(&args),
    }
}
