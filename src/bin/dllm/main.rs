//! `dllm`: run, measure and inspect diffusion language models.
//!
//! Exit status: 0 done, 1 the work failed, 2 the arguments are wrong. stdout holds results only.

mod args;
mod bench;
mod doctor;
mod eval;
mod generate;
mod inspect;
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
  dllm                                        the shipped model answers a sample question, shown as it unmasks
  dllm generate --chat --prompt \"How are you?\" --model DIR
  dllm generate --help                        every flag of a decode
  dllm eval --limit 50                        what caches and policies cost in accuracy, and save in time
  dllm inspect DIR                            what a checkpoint holds
  dllm doctor                                 what the CUDA devices are, and whether the kernels are right on them
";

/// Diffusion language models (LLaDA, Dream): decode, measure, inspect
///
/// Without a command, the shipped checkpoint models/tiny-math answers a sample question.
#[derive(Parser)]
#[command(name = "dllm", version, after_help = EXAMPLES, max_term_width = 120)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Answer one prompt, or a batch of them
    Generate(Box<generate::Generate>),
    /// Accuracy, forward passes and speed of decode settings on a set of problems
    Eval(Box<eval::Eval>),
    /// What a checkpoint holds, and the memory that it needs
    Inspect(inspect::Inspect),
    /// The settings that dLLM-Cache publishes, for --preset
    Presets(presets::Presets),
    /// The decode modes side by side
    Bench(bench::Bench),
    /// Driver, devices, and every CUDA op against its oracle
    Doctor(doctor::Doctor),
}

fn main() -> ExitCode {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        // Such a panic is caught, and told as an error.
        if !tokenizer::is_shielded() {
            report(info);
        }
    }));
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to stdout, and whoever reads it may stop early.
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
