//! Every flag reaches the field that it is for, and no other. The other commands use the helpers of this file for their own flags.

use super::*;
use clap::CommandFactory;
use std::collections::BTreeSet;
use std::fmt::Debug;

/// Parser of the flags of a command.
#[derive(Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct Flags<T: Args> {
    #[command(flatten)]
    flags: T,
}

/// Parses a command line, without the names of program and command.
pub fn parse<T: Args>(line: &str) -> T {
    Flags::<T>::try_parse_from(line.split_whitespace()).unwrap_or_else(|error| panic!("{line}: {error}")).flags
}

/// Returns the names and aliases of all flags of a command, and the names of its positional arguments.
pub fn names<T: Args>() -> BTreeSet<String> {
    let command = Flags::<T>::command();
    let mut names = BTreeSet::new();
    for arg in command.get_arguments() {
        names.insert(arg.get_long().unwrap_or(arg.get_id().as_str()).to_string());
        names.extend(arg.get_all_aliases().unwrap_or_default().into_iter().map(String::from));
    }
    names
}

/// Returns the name of the last flag of a line: `factor` for `--policy=factor --factor=2`.
pub fn last_name(line: &str) -> &str {
    let flag = line.rsplit(' ').next().and_then(|word| word.strip_prefix("--")).unwrap_or_else(|| panic!("{line}"));
    flag.split('=').next().unwrap_or(flag)
}

/// Checks that the lines of a table cover all flags of a command, and nothing else. A new flag needs a line.
#[track_caller]
pub fn covers<'a, T: Args>(lines: impl IntoIterator<Item = &'a str>) {
    let covered: BTreeSet<String> = lines.into_iter().map(|line| last_name(line).to_string()).collect();
    assert_eq!(covered, names::<T>(), "left: flags with a line in the table, right: flags of the command");
}

/// Panics unless two values have the same fields.
#[track_caller]
pub fn same(line: &str, got: &impl Debug, want: &impl Debug) {
    assert_eq!(format!("{got:#?}"), format!("{want:#?}"), "{line}");
}

/// Change of a value by a line of flags.
pub type Change<T> = (&'static str, fn(&mut T));

/// Checks that each line of flags changes the parsed struct of a command as its function does, and that the lines cover all flags
/// but those of [`Decoding`].
pub fn fields<T: Args + Debug>(default: &str, lines: &[Change<T>]) {
    for (line, change) in lines {
        let mut want = parse::<T>(default);
        change(&mut want);
        same(line, &parse::<T>(&format!("{default} {line}")), &want);
        assert_ne!(format!("{want:?}"), format!("{:?}", parse::<T>(default)), "{line} gives the default");
    }
    let own = lines.iter().map(|(line, _)| *line);
    covers::<T>(own.chain(DECODING.iter().filter(|_| names::<T>().contains("gen-length")).map(|row| row.line)));
}

/// One flag of [`Decoding`] with a value that is not its default.
pub struct Row {
    /// Command line; the flag is its last word.
    pub line: &'static str,
    /// Change of the default options.
    pub change: fn(&mut Options),
    /// Whether the flag is one of a cache or a policy, so that `eval` takes it as a setting of its own.
    pub chooses_mode: bool,
}

const fn row(line: &'static str, change: fn(&mut Options)) -> Row {
    Row { line, change, chooses_mode: false }
}

const fn mode(line: &'static str, change: fn(&mut Options)) -> Row {
    Row { line, change, chooses_mode: true }
}

/// All flags of a decode.
pub const DECODING: &[Row] = &[
    row("--gen-length=96", |o| o.gen_length = 96),
    row("--block-length=16", |o| o.block_length = Some(16)),
    row("--steps=8", |o| o.steps = Some(8)),
    row("--confidence=margin", |o| o.confidence = Some(Confidence::Margin)),
    row("--early-stop", |o| o.early_stop = true),
    row("--temperature=0.5", |o| o.temperature = 0.5),
    row("--alg-temp=0.25", |o| o.alg_temp = 0.25),
    row("--top-p=0.95", |o| o.top_p = Some(0.95)),
    row("--top-k=7", |o| o.top_k = Some(7)),
    row("--cfg-scale=1.5", |o| o.cfg_scale = 1.5),
    row("--eps=0.01", |o| o.eps = 0.01),
    row("--seed=11", |o| o.seed = 11),
    mode("--cache=adaptive", |o| o.cache = CacheMode::Adaptive),
    mode("--policy=fixed", |o| o.policy = Policy::Fixed),
    mode("--threshold=0.75", |o| o.policy = Policy::Threshold(0.75)),
    mode("--policy=factor --factor=2.5", |o| o.policy = Policy::Factor(2.5)),
    mode("--prompt-interval=9", |o| o.prompt_interval = 9),
    mode("--response-interval=3", |o| o.response_interval = 3),
    mode("--cfg-interval=4", |o| o.cfg_interval = 4),
    mode("--refresh-ratio=0.5", |o| o.refresh_ratio = Some(0.5)),
    mode("--refresh-rows=0.75", |o| o.refresh_ratio = Some(0.75)),
    mode("--refresh-prompt-every=2", |o| o.refresh_prompt_every = 2),
    mode("--vicinity=5", |o| o.vicinity = 5),
    mode("--suffix-window=6", |o| o.suffix_window = Some(6)),
    mode("--preset=humaneval-dream-instruct", |o| {
        *o = Options {
            gen_length: 256,
            block_length: Some(256),
            steps: Some(256),
            cache: CacheMode::Adaptive,
            prompt_interval: 50,
            response_interval: 1,
            policy: Policy::Fixed,
            confidence: Some(Confidence::Entropy),
            temperature: 0.2,
            top_p: Some(0.95),
            ..Options::default()
        }
    }),
];

/// Returns the default options with the change of a row.
fn changed(row: &Row) -> Options {
    let mut options = Options::default();
    (row.change)(&mut options);
    options
}

#[test]
fn every_flag_of_a_decode_sets_its_option() {
    covers::<Decoding>(DECODING.iter().map(|row| row.line));
    for row in DECODING {
        let decoding = parse::<Decoding>(row.line);
        same(row.line, &decoding.options(), &changed(row));
        assert_eq!(decoding.chooses_mode(), row.chooses_mode, "{}", row.line);
        // A setting of `eval` has the same keys, and overrides the command line.
        let setting = row.line.replace("--", "").replace(' ', ", ");
        same(&setting, &Decoding::default().with_setting(&setting).unwrap().options(), &changed(row));
        let other = Decoding { seed: Some(5), ..Decoding::default() };
        let seed = if last_name(row.line) == "seed" { 11 } else { 5 };
        let with_seed = Options { seed, ..changed(row) };
        same(&setting, &other.with_setting(&setting).unwrap().options(), &with_seed);
    }
}

/// Every option has a flag, but the tokens that end a text: they are those of the checkpoint.
#[test]
fn every_option_has_a_flag() {
    let fields = |options: &Options| -> Vec<String> {
        let text = format!("{options:#?}");
        // Fields of the struct itself have four spaces; a field of several lines begins on the first one.
        let mut fields: Vec<String> = vec![];
        for line in text.lines().filter(|line| line.starts_with("    ")) {
            match line.strip_prefix("    ").filter(|field| !field.starts_with([' ', ')', ']', '}'])) {
                Some(field) => fields.push(field.into()),
                None => *fields.last_mut().unwrap() += line,
            }
        }
        fields
    };
    let default = fields(&Options::default());
    assert_eq!(default.len(), 22, "{default:#?}");
    for (i, field) in default.iter().enumerate().filter(|(_, field)| !field.starts_with("end_tokens:")) {
        let sets = |row: &&Row| fields(&parse::<Decoding>(row.line).options())[i] != *field;
        assert!(DECODING.iter().any(|row| sets(&row)), "no flag sets {field}");
    }
}

/// Other flags override those of a preset.
#[test]
fn flags_override_a_preset() {
    for row in DECODING.iter().filter(|row| !row.line.starts_with("--preset")) {
        let options = parse::<Decoding>(&format!("--preset=humaneval-llada-instruct {}", row.line)).options();
        let mut want = Options {
            gen_length: 512,
            block_length: Some(32),
            steps: Some(512),
            cache: CacheMode::Adaptive,
            prompt_interval: 50,
            response_interval: 8,
            policy: Policy::Fixed,
            ..Options::default()
        };
        match last_name(row.line) {
            // A length that is not the published one has one step per token.
            "gen-length" => (want.gen_length, want.steps) = (96, None),
            // The preset has another policy, so that its number has no effect.
            "threshold" => {}
            _ => (row.change)(&mut want),
        }
        same(row.line, &options, &want);
    }
}

/// Each flag without effect is named with the flag that decides it.
#[test]
fn idle_flags() {
    for (line, idle) in [
        ("--threshold=0.5", &[][..]),
        ("--threshold=0.5 --policy=fixed", &["--threshold (see --policy)"]),
        ("--policy=factor --factor=2 --threshold=0.5", &["--threshold (see --policy)"]),
        ("--factor=2", &["--factor (see --policy)"]),
        ("--preset=gsm8k-llada-base --cache=dual", &["--preset (see --cache)"]),
        ("--preset=gsm8k-llada-base", &[]),
        ("--prompt-interval=9 --response-interval=3 --refresh-ratio=0.5 --cache=adaptive", &[]),
        ("--prompt-interval=9", &["--prompt-interval (see --cache)"]),
        ("--response-interval=9 --cache=prefix", &["--response-interval (see --cache)"]),
        ("--refresh-ratio=0.5 --cache=none", &["--refresh-ratio (see --cache)"]),
        ("--refresh-ratio=0.5 --cache=prefix", &[]),
        ("--cfg-interval=2 --cache=adaptive", &["--cfg-interval (see --cache, --cfg-scale)"]),
        ("--cfg-interval=2 --cfg-scale=1", &["--cfg-interval (see --cache, --cfg-scale)"]),
        ("--cfg-interval=2 --cfg-scale=1 --cache=adaptive", &[]),
        ("--refresh-prompt-every=2 --vicinity=3", &[]),
        (
            "--refresh-prompt-every=2 --vicinity=3 --cache=adaptive",
            &["--refresh-prompt-every (see --cache)", "--vicinity (see --cache)"],
        ),
    ] {
        assert_eq!(parse::<Decoding>(line).idle_flags(), idle, "{line}");
    }
}

#[test]
fn names_are_parsed() {
    for mode in CacheMode::ALL {
        assert_eq!(mode.to_string().parse::<CacheMode>().unwrap(), mode);
    }
    for kind in Confidence::ALL {
        assert_eq!(kind.to_string().parse::<Confidence>().unwrap(), kind);
    }
    for name in Policy::NAMES {
        assert_eq!(name.parse::<Policy>().unwrap().name(), name);
    }
    for family in [Family::Llada, Family::Dream] {
        assert_eq!(family.to_string().to_lowercase().parse::<Family>().unwrap(), family);
    }
    assert!(dllm_kernels::Config::SHAPES.iter().all(|name| dllm_kernels::Config::shape(name).is_some()));
    let error = "sometimes".parse::<CacheMode>().unwrap_err().to_string();
    assert_eq!(error, "cache: expected none, prefix, dual or adaptive, found sometimes");
}
