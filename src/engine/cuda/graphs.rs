//! Captured graphs: their keys, their capture and their replay.

use super::CudaEngine;
use crate::backend::LaunchBucket;
use crate::backend::cuda::{SamplingInputs, SamplingKey};
use crate::error::Result;
use crate::gpu::{Graph, Stream, nvtx};
use crate::model::LayerPlan;
use crate::sampling::SamplingParams;
use std::collections::HashMap;

/// The cache is cleared when it holds more graphs than this. Only observed decodes reach it.
const MAX_GRAPHS: usize = 64;

/// The graphs of a decode.
#[derive(Default)]
pub(super) struct GraphCache {
    graphs: HashMap<GraphKey, CapturedPass>,
}

/// Everything that a graph depends on.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct GraphKey {
    /// Index of the step template.
    template: usize,
    part: GraphPart,
    bucket: LaunchBucket,
    plan: Vec<LayerPlan>,
    sampling: SamplingKey,
}

/// A part of a pass that is captured on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum GraphPart {
    /// Embedding and first layer.
    FirstLayer,
    /// The other layers, the head, unmask and advance.
    Remainder,
}

/// A part of a pass. Its first run is not captured, since libraries load their kernels in it, which a capture does not allow.
enum CapturedPass {
    /// Run once.
    NotCaptured,
    /// Captured in its second run.
    Graph(Graph),
}

impl GraphCache {
    /// Clears the cache if it is too large. Synchronises then, since graphs may be running.
    pub fn limit(&mut self, stream: &Stream) -> Result<()> {
        if self.graphs.len() > MAX_GRAPHS {
            stream.synchronize()?;
            self.graphs.clear();
        }
        Ok(())
    }

    /// Returns the number of nodes of the first layer and of the whole pass, for the captured pass with the fewest rows, and of
    /// those the one with the fewest selected rows.
    pub fn smallest_pass(&self) -> Result<Option<[usize; 2]>> {
        let captured = |part: GraphPart| {
            self.graphs.iter().filter_map(move |(key, captured)| match captured {
                CapturedPass::Graph(graph) if key.part == part => Some((key, graph)),
                _ => None,
            })
        };
        let smallest = captured(GraphPart::FirstLayer).min_by_key(|(key, _)| (key.bucket.rows, key.bucket.selected));
        let Some((key, first_layer)) = smallest else { return Ok(None) };
        let same_pass =
            |other: &GraphKey| (other.template, other.bucket, &other.plan) == (key.template, key.bucket, &key.plan);
        let Some((_, remainder)) = captured(GraphPart::Remainder).find(|(other, _)| same_pass(other)) else {
            return Ok(None);
        };
        let first_layer = first_layer.nodes()?;
        Ok(Some([first_layer, first_layer + remainder.nodes()?]))
    }
}

impl CudaEngine<'_> {
    /// Layers of [`GraphPart::FirstLayer`]. The last layer is never one of them.
    pub(super) fn num_first_layers(&self) -> usize {
        1.min(self.session.num_layers() - 1)
    }

    /// Enqueues a part of a pass: as a graph, from its second run on. Returns its multiply-accumulates.
    pub(super) fn launch(
        &mut self,
        template: usize,
        part: GraphPart,
        params: &SamplingParams,
        sampling: SamplingKey,
    ) -> Result<u64> {
        let tables = &self.tables[template];
        let _range = nvtx::range_of(|| format!("step, {} rows: {part:?}", tables.bucket.rows));
        // The first layer does not depend on the sampling.
        let sampling = if part == GraphPart::FirstLayer { SamplingKey::default() } else { sampling };
        let key = GraphKey { template, part, bucket: tables.bucket, plan: tables.plan.clone(), sampling };
        match self.graphs.graphs.get(&key) {
            Some(CapturedPass::Graph(_)) => {}
            Some(CapturedPass::NotCaptured) => {
                let stream = self.stream().clone();
                let graph = stream.capture(|| self.enqueue(template, part, params, sampling))?;
                self.graphs.graphs.insert(key.clone(), CapturedPass::Graph(graph));
            }
            None => {
                self.graphs.graphs.insert(key.clone(), CapturedPass::NotCaptured);
                self.enqueue(template, part, params, sampling)?;
            }
        }
        if let Some(CapturedPass::Graph(graph)) = self.graphs.graphs.get(&key) {
            // SAFETY: the graph uses memory of this engine, and of the model, which outlives it. It runs on this stream only.
            unsafe { graph.launch() }?;
        }
        Ok(self.count_part(template, part))
    }

    /// Counts an enqueued part of a pass. Returns its multiply-accumulates.
    pub(super) fn count_part(&mut self, template: usize, part: GraphPart) -> u64 {
        if part == GraphPart::Remainder {
            // The device counts the pass with the last kernel of this part.
            self.state.count_pass();
        }
        let (first, layers) = (self.num_first_layers(), self.session.num_layers());
        let range = if part == GraphPart::FirstLayer { 0..first } else { first..layers + 1 };
        let macs = self.session.pass_macs(template, &self.tables[template].plan, range);
        self.session.add_macs(macs);
        macs
    }

    /// Enqueues the kernels and products of a part of a pass.
    pub(super) fn enqueue(
        &mut self,
        template: usize,
        part: GraphPart,
        params: &SamplingParams,
        sampling: SamplingKey,
    ) -> Result<()> {
        let _range = nvtx::range(match part {
            GraphPart::FirstLayer => "first layer",
            GraphPart::Remainder => "other layers, head, unmask",
        });
        let (first, layers) = (self.num_first_layers(), self.session.num_layers());
        let plan = self.tables[template].plan.clone();
        let range = match part {
            GraphPart::FirstLayer => {
                self.session.embed(template, None)?;
                0..first
            }
            GraphPart::Remainder => first..layers,
        };
        for layer in range {
            let _range = nvtx::range_of(|| format!("layer {layer}"));
            self.session.layer(template, &plan, layer, None)?;
        }
        if part == GraphPart::Remainder {
            self.session.head(template, &plan, None)?;
            self.sample(template, params, sampling)?;
        }
        Ok(())
    }

    /// Enqueues the sampling of a pass.
    fn sample(&mut self, template: usize, params: &SamplingParams, sampling: SamplingKey) -> Result<()> {
        let config = self.session.model_config();
        let tables = &self.tables[template];
        let branches = if params.cfg_scale > 0.0 { 2 } else { 1 };
        let inputs = SamplingInputs {
            state: &self.state,
            rows: &tables.rows,
            logits: self.session.logits_buffer(),
            logit_rows: tables.bucket.logit_rows / branches,
            vocab_size: config.vocab_size,
            mask_token: config.mask_token_id,
        };
        self.session.backend().sample(&inputs, params, sampling)
    }
}
