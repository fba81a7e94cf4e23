//! The CUDA engine: tokens, masks and schedules stay on the device, and each pass is replayed as two captured graphs.
//!
//! A pass is two graphs: the first layer; and the remainder, which is the other layers, the head, unmask and advance. While a pass
//! runs, the host enqueues the first layer of the next pass, then polls the progress counter of the running pass, and enqueues the
//! remainder or stops. So the device does not idle while the host learns the result. At the end of a block one first layer is
//! discarded. It commits nothing; with the adaptive cache it stores keys and values of the current tokens.

mod graphs;
mod memory;
mod run;

use super::guidance::Guidance;
use super::limits::{ensure_device_memory, with_needed_bytes};
use super::run::{DecodeRun, StepTemplate};
use crate::backend::cuda::{Cuda, DecodeState, RowTable, RunStart, TableRow};
use crate::backend::{Backend, LaunchBucket};
use crate::error::{Error, Result};
use crate::gpu::{Device, Stream, SyncOnDrop};
use crate::model::{Config, LayerPlan, Session, SessionConfig, Transformer};
use graphs::GraphCache;
use memory::{decode_sizes, device_bytes};

/// Row counts that shrink from block to block are padded to this many sizes. This bounds both the number of graphs and the share
/// of padded rows.
const WINDOW_BUCKETS: usize = 8;
/// Candidates of a pass: unmask has one grid row (dimension y) for each.
const MAX_CANDIDATES: usize = 65_535;
/// Sequences of a pass: attention has up to 64 splits of each in grid dimension z.
const MAX_SEQUENCES: usize = 65_535 / 64;
/// The number of logit rows is padded to a multiple of this.
const LOGIT_ROW_ALIGN: usize = 32;

/// An engine on a CUDA device.
pub struct CudaEngine<'m> {
    graphs: GraphCache,
    guidance: Guidance,
    session: Session<'m, Cuda>,
    state: DecodeState,
    /// One for each kind of pass.
    tables: Vec<PassTables>,
    /// Dropped last, so that it synchronises after the other fields have freed their memory.
    _sync: SyncOnDrop,
}

/// One kind of pass.
struct PassTables {
    plan: Vec<LayerPlan>,
    bucket: LaunchBucket,
    rows: RowTable,
}

/// Checks that the kernels can run a model of this shape.
///
/// # Errors
/// [`Error::Unsupported`] names the first size that they do not support.
pub fn check_model(config: &Config) -> Result<()> {
    let d_model_fits = config.d_model.is_multiple_of(8) && config.d_model <= 8192;
    let sizes = [
        ("head_dim", config.head_dim, "32, 64 or 128", [32, 64, 128].contains(&config.head_dim)),
        ("d_model", config.d_model, "a multiple of 8, at most 8192", d_model_fits),
        ("mlp_hidden_size", config.mlp_hidden_size, "a multiple of 8", config.mlp_hidden_size.is_multiple_of(8)),
        ("vocab_size", config.vocab_size, "a multiple of 8", config.vocab_size.is_multiple_of(8)),
        ("vocab_size", config.vocab_size, "at most 16777215", config.vocab_size < 1 << 24),
    ];
    match sizes.into_iter().find(|(.., fits)| !fits) {
        None => Ok(()),
        Some((name, found, expected, _)) => Err(Error::unsupported(name, expected, found)),
    }
}

impl<'m> CudaEngine<'m> {
    /// Allocates the buffers of a decode.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the kernels cannot run the model; [`Error::OutOfMemory`] when the device does not have enough
    /// free memory; the driver's errors.
    pub fn new(transformer: &'m Transformer<Cuda>, device: &Device, config: SessionConfig) -> Result<CudaEngine<'m>> {
        let model = transformer.config();
        check_model(model)?;
        let (sequences, candidates) = (config.prompt_lens.len(), config.max_candidates);
        let what = format!("{sequences} sequences of up to {} positions", config.longest());
        for (counted, found, limit) in [
            ("positions that may be committed in a pass", candidates, MAX_CANDIDATES),
            ("sequences (with guidance each counts twice)", config.limits(model).sequences, MAX_SEQUENCES),
        ] {
            if found > limit {
                let (expected, found) = (format!("at most {limit} {counted}"), format!("{found} in {what}"));
                return Err(Error::Unsupported { what: "the CUDA kernels".into(), expected, found });
            }
        }
        let needed = device_bytes(&config, model, device.multiprocessors()?)?.iter().sum();
        ensure_device_memory(device, &what, needed)?;
        let named = |error| with_needed_bytes(error, &what, needed);
        let cuda = Cuda::new(device)?;
        let stream = cuda.stream().clone();
        let sync = stream.sync_on_drop();
        let sizes = decode_sizes(&config, model);
        let state = DecodeState::new(&stream, sizes).map_err(named)?;
        let pass_tables = || -> Result<PassTables> {
            let rows = RowTable::new(&stream, sizes).map_err(named)?;
            Ok(PassTables { plan: vec![], bucket: LaunchBucket::default(), rows })
        };
        let tables = (0..config.num_templates()).map(|_| pass_tables()).collect::<Result<_>>()?;
        let session = Session::new(transformer, cuda, config).map_err(named)?;
        Ok(CudaEngine {
            graphs: GraphCache::default(),
            guidance: Guidance::default(),
            session,
            state,
            tables,
            _sync: sync,
        })
    }

    fn stream(&self) -> &Stream {
        self.session.backend().stream()
    }

    /// Stores the rows and candidates of a kind of pass.
    fn set_template(&mut self, index: usize, template: &StepTemplate) -> Result<()> {
        let max_candidates = self.session.config().max_candidates;
        let positions: Vec<_> = template.candidates.iter().map(|(s, positions)| (*s, &positions[..])).collect();
        let count: usize = positions.iter().map(|(_, positions)| positions.len()).sum();
        if count > max_candidates {
            let expected = format!("at most {max_candidates}, as the engine was made for");
            return Err(Error::argument("candidates", expected, count));
        }
        let session = &mut self.session;
        let logit_rows = padded_logit_rows(session, template, &positions, count);
        let row_counts: Vec<usize> = template.query_rows.iter().map(|rows| rows.rows.len()).collect();
        let buckets = if template.shrinks { WINDOW_BUCKETS } else { 0 };
        let bucket = session.config().bucket(&row_counts, logit_rows.len(), buckets);
        let bucket = session.set_batch(index, template.query_rows, template.plan, &logit_rows, Some(bucket))?;

        // Logits are in the order of the candidates, rows of the table in the order of the sequences.
        let mut rows_of = vec![vec![]; session.config().prompt_lens.len()];
        let mut logits_row = 0;
        for (sequence, positions) in &positions {
            let offset = session.token_offset(*sequence);
            rows_of[*sequence].extend(positions.iter().enumerate().map(|(i, position)| TableRow {
                token: offset + position,
                logits_row: logits_row + i,
                position: *position,
            }));
            logits_row += positions.len();
        }
        let num_layers = session.num_layers();
        let tables = &mut self.tables[index];
        tables.bucket = bucket;
        tables.plan.clear();
        tables.plan.extend((0..num_layers).map(|layer| template.plan.layer(layer)));
        tables.rows.write(&rows_of)
    }

    /// Enqueues the state at the start of a run. Its first pass can be enqueued next.
    fn begin(&mut self, tokens: &[Vec<u32>], run: &DecodeRun) -> Result<()> {
        let stream = self.stream().clone();
        self.graphs.limit(&stream)?;
        let concat_tokens = self.session.concat_tokens(tokens);
        self.session.backend_mut().write_tokens(&concat_tokens)?;
        for (index, template) in run.templates.iter().enumerate() {
            let Some(template) = template else { continue };
            if index >= self.tables.len() {
                let expected = format!("at most {}, as the engine was made for", self.tables.len());
                return Err(Error::argument("templates", expected, index + 1));
            }
            self.set_template(index, template)?;
        }
        let spans: Vec<_> =
            tokens.iter().enumerate().map(|(s, tokens)| (self.session.token_offset(s), tokens.len())).collect();
        self.state.begin(&RunStart {
            sequences: run.sequences,
            tokens: &spans,
            schedule: run.schedule,
            first_pass: run.first_pass,
            end_tokens: run.end_tokens,
        })
    }

    /// Waits until the device has finished the passes that were counted. Asks the driver now and then: a failed pass does not
    /// advance the counter.
    fn wait(&self) -> Result<()> {
        const SPINS: u32 = 256;
        loop {
            for _ in 0..SPINS {
                if self.state.is_finished() {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            if self.stream().is_done()? && !self.state.is_finished() {
                let message = "the device has finished, but the progress counter of a pass was not written";
                return Err(Error::Unavailable(message.into()));
            }
            std::thread::yield_now();
        }
    }

    /// Reads back the tokens. Synchronises.
    fn read_tokens(&self, tokens: &mut [Vec<u32>]) -> Result<()> {
        let concat_tokens = self.session.backend().tokens()?.read()?;
        let mut rest = &concat_tokens[..];
        for sequence in tokens {
            let (own, others) = rest.split_at(sequence.len());
            rest = others;
            sequence.iter_mut().zip(own).for_each(|(to, token)| *to = *token as u32);
        }
        Ok(())
    }
}

impl Drop for CudaEngine<'_> {
    fn drop(&mut self) {
        // The weights may be freed next, and the stream does not own them. The error would belong to discarded work.
        let _ = self.stream().synchronize();
    }
}

/// Returns the logit rows of a pass, padded with row 0. Unconditional rows begin after the padding of the conditional ones.
fn padded_logit_rows(
    session: &Session<Cuda>,
    template: &StepTemplate,
    positions: &[(usize, &[usize])],
    count: usize,
) -> Vec<usize> {
    let padded = count.next_multiple_of(LOGIT_ROW_ALIGN).min(session.config().max_candidates);
    let mut logit_rows = session.logit_rows(template.query_rows, positions);
    if session.config().guided {
        let unconditional = logit_rows.split_off(count);
        logit_rows.resize(padded, 0);
        logit_rows.extend(unconditional);
        logit_rows.resize(2 * padded, 0);
    } else {
        logit_rows.resize(padded, 0);
    }
    logit_rows
}
