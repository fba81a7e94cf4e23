//! `dllm presets`: the published settings that `--preset` takes.

use crate::output::{print, print_json};
use crate::report::table;
use dllm_kernels::Result;
use dllm_kernels::decode::presets::{PRESETS, Preset, SOURCE};

/// List the settings that dLLM-Cache publishes, by task and model: what --preset takes
#[derive(clap::Args, Debug)]
pub struct Presets {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What `--preset` takes.
pub fn preset(name: &str) -> Result<&'static Preset, String> {
    Preset::find(name).ok_or_else(|| "no such preset; `dllm presets` lists them".into())
}

/// Runs the command.
pub fn run(args: &Presets) -> Result<()> {
    if args.json {
        return print_json(&serde_json::json!({ "source": SOURCE, "presets": PRESETS }));
    }
    let head =
        ["preset", "prompt-interval", "response-interval", "refresh-ratio", "block-length", "gen-length", "steps"];
    let mut rows = vec![head.map(String::from).to_vec()];
    for preset in PRESETS {
        let lengths = preset.lengths.map(|n| n.to_string());
        let ratio = preset.options(None).effective_refresh_ratio();
        let numbers = [preset.prompt_interval.to_string(), preset.response_interval.to_string(), ratio.to_string()];
        rows.push([vec![preset.name.to_string()], numbers.to_vec(), lengths.to_vec()].concat());
    }
    let note = "All with --cache adaptive --policy fixed; Dream's with --temperature 0.2 --top-p 0.95 --confidence entropy.\n\
                Flags given beside --preset stand instead of its own; blocks of all positions follow --gen-length.";
    print(&format!("{}\n{note}\nSource: {SOURCE}.\n", table(&rows)))
}
