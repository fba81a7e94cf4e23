//! `dllm presets`: lists the published settings, for `--preset`.

use crate::output::{print, print_json};
use crate::report::table;
use dllm_kernels::Result;
use dllm_kernels::decode::presets::{PRESETS, Preset, SOURCE};

/// List the settings published by dLLM-Cache, by task and model, for --preset
#[derive(clap::Args, Debug)]
pub struct Presets {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Parses `--preset`.
pub fn preset(name: &str) -> Result<&'static Preset, String> {
    Preset::find(name).ok_or_else(|| "no preset of this name; run `dllm presets` for a list".into())
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
                Other flags override those of a preset. A block length equal to gen-length follows --gen-length.";
    print(&format!("{}\n{note}\nSource: {SOURCE}.\n", table(&rows)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_sets_its_field() {
        crate::args::tests::fields::<Presets>("", &[("--json", |p| p.json = true)]);
    }
}
