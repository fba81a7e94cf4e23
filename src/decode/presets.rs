//! The options that dLLM-Cache publishes for its evaluations, by task and model.

use super::options::{Options, Policy};
use crate::cache::CacheMode;
use crate::model::Family;
use crate::sampling::Confidence;
use serde::Serialize;

/// Source of the presets.
pub const SOURCE: &str = "evaluation scripts of github.com/maomaocun/dLLM-cache at 17235bf";

/// Published options of one task and model: the adaptive cache with a ratio of 0.25, and the fixed policy.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Preset {
    /// Name of the task and the model.
    pub name: &'static str,
    /// Forwards between two refreshes of the prompt.
    pub prompt_interval: usize,
    /// Forwards between two refreshes of the response.
    pub response_interval: usize,
    /// Block length, generated length and steps.
    pub lengths: [usize; 3],
}

impl Preset {
    /// Returns the preset of this name.
    pub fn find(name: &str) -> Option<&'static Preset> {
        PRESETS.iter().find(|preset| preset.name == name)
    }

    /// Returns the family of the models that the preset is for.
    pub fn family(&self) -> Family {
        if self.name.contains("-dream-") { Family::Dream } else { Family::Llada }
    }

    /// Returns the options of the preset. `gen_length` replaces the published length; then there is one step per token, and a block
    /// of the published length gets the new length. Dream's tokens are sampled.
    pub fn options(&self, gen_length: Option<usize>) -> Options {
        let [block_length, published, steps] = self.lengths;
        let gen_length = gen_length.unwrap_or(published);
        let options = Options {
            gen_length,
            block_length: Some(if block_length == published { gen_length } else { block_length }),
            steps: (gen_length == published).then_some(steps),
            cache: CacheMode::Adaptive,
            prompt_interval: self.prompt_interval,
            response_interval: self.response_interval,
            policy: Policy::Fixed,
            ..Options::default()
        };
        match self.family() {
            Family::Llada => options,
            Family::Dream => {
                Options { temperature: 0.2, top_p: Some(0.95), confidence: Some(Confidence::Entropy), ..options }
            }
        }
    }
}

const fn llada(name: &'static str, [prompt_interval, response_interval]: [usize; 2], lengths: [usize; 3]) -> Preset {
    Preset { name, prompt_interval, response_interval, lengths }
}

const fn dream(name: &'static str, [prompt_interval, response_interval]: [usize; 2]) -> Preset {
    Preset { name, prompt_interval, response_interval, lengths: [256, 256, 256] }
}

/// Lengths of most tasks with LLaDA Base.
const BASE: [usize; 3] = [256, 256, 256];

/// All presets. When two are published for one task, the name of the second one ends with its prompt interval.
pub const PRESETS: &[Preset] = &[
    llada("gsm8k-llada-base", [100, 6], BASE),
    llada("gsm8k-llada-base-25", [25, 5], BASE),
    llada("gsm8k-llada-instruct", [50, 7], [8, 256, 256]),
    dream("gsm8k-dream-base", [100, 8]),
    dream("gsm8k-dream-instruct", [25, 2]),
    llada("bbh-llada-base", [50, 6], BASE),
    llada("bbh-llada-instruct", [50, 6], [256, 256, 256]),
    dream("bbh-dream-base", [25, 4]),
    dream("bbh-dream-instruct", [10, 2]),
    llada("gpqa-llada-base", [100, 8], BASE),
    llada("gpqa-llada-instruct", [50, 6], [64, 128, 128]),
    dream("gpqa-dream-base", [100, 8]),
    dream("gpqa-dream-instruct", [10, 8]),
    llada("humaneval-llada-base", [50, 5], BASE),
    llada("humaneval-llada-instruct", [50, 8], [32, 512, 512]),
    llada("humaneval-llada-instruct-25", [25, 5], [32, 512, 512]),
    dream("humaneval-dream-base", [5, 1]),
    dream("humaneval-dream-instruct", [50, 1]),
    llada("mbpp-llada-base", [50, 4], [32, 256, 256]),
    llada("mbpp-llada-base-25", [25, 4], [32, 256, 256]),
    llada("mbpp-llada-instruct", [100, 5], [32, 512, 512]),
    dream("mbpp-dream-base", [25, 8]),
    dream("mbpp-dream-instruct", [10, 8]),
    llada("math-llada-base", [50, 8], BASE),
    llada("math-llada-instruct", [50, 1], [256, 256, 256]),
    dream("math-dream-base", [100, 4]),
    dream("math-dream-instruct", [50, 1]),
    llada("mmlu-llada-base", [100, 6], BASE),
    llada("mmlu-llada-instruct", [100, 7], [3, 3, 3]),
    dream("mmlu-dream-base", [100, 2]),
    dream("mmlu-dream-instruct", [100, 8]),
    llada("mmlu-pro-llada-base", [100, 6], BASE),
    llada("mmlu-pro-llada-instruct", [51, 3], [256, 256, 256]),
    dream("mmlu-pro-dream-base", [25, 2]),
    dream("mmlu-pro-dream-instruct", [5, 1]),
    llada("hotpotqa-llada-instruct", [100, 8], [32, 32, 32]),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::Algorithm;
    use crate::model::Config;

    /// Every preset has a unique name, is found by it, and selects the algorithm of its family.
    #[test]
    fn all_are_valid() {
        for preset in PRESETS {
            assert_eq!(PRESETS.iter().filter(|other| other.name == preset.name).count(), 1, "{}", preset.name);
            assert_eq!(Preset::find(preset.name), Some(preset));
            let family = preset.family();
            let config = Config { family, ..Config::shape("mid").unwrap() };
            for gen_length in [None, Some(128), Some(512)] {
                let options = preset.options(gen_length);
                options.validate(&config, &[vec![1]]).unwrap();
                let algorithm = if family == Family::Dream { Algorithm::Dream } else { Algorithm::Llada };
                assert_eq!((options.algorithm(family), options.cache), (algorithm, CacheMode::Adaptive));
            }
        }
        assert_eq!(Preset::find("gsm8k"), None);
    }
}
