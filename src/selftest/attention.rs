//! Attention of a block over a cache in three segments; and of ragged sequences with grouped heads, tile lists and
//! log-sum-exps.

use super::{Case, Entry, ErrorBound, Float, HostDevice, Output, Random, Rows, pick, widened};
use crate::error::Result;
use crate::gpu::{Buffer, Stream};
use crate::ops::attention::{self, Attention, Form, Heads, KEY_TILE, QUERY_TILE, Segment};
use crate::ops::tiles::{Batch, DeviceTiles, Sequence, TileLists};
use crate::reference::attention::attend;
use half::{bf16, f16};
use std::ops::Range;

/// Bound of a result, relative to the largest of its row and head, in epsilons of its type: its own rounding, and that of the
/// weights before they are multiplied by the values.
const EPSILONS: f64 = 1.3;

/// Returns the checks of `dllm doctor`.
pub fn entries(small: bool) -> Vec<Entry> {
    let (num_heads, rows, keys) = pick(small, (32, 32, [736, 32, 256]), (4, 8, [120, 8, 64]));
    let llada = Shape {
        heads: Heads { num_heads, num_kv_heads: num_heads, head_dim: 128 },
        sequences: vec![Sequence { rows, keys }],
        visits: Visits::All,
        form: None,
        lse: true,
    };
    let groups = Shape {
        heads: Heads { num_heads: 6, num_kv_heads: 2, head_dim: 64 },
        sequences: vec![Sequence { rows: 5, keys: [70, 5, 330] }, Sequence { rows: 130, keys: [0, 130, 33] }],
        visits: Visits::Pruned { near: 60, every: 3 },
        ..llada.clone()
    };
    let total: usize = keys.iter().sum();
    let shape = format!("1x{rows} {num_heads}/{num_heads}x128, {total} keys in 3 parts");
    vec![
        Entry::new::<bf16, _>("attention", shape, move |stream| Sequences::<bf16>::new(stream, llada.clone())),
        Entry::new::<f16, _>("attention", "5 and 130 rows 6/2x64, pruned suffix".into(), move |stream| {
            Sequences::<f16>::new(stream, groups.clone())
        }),
    ]
}

/// Shape of a case.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Heads of a row.
    pub heads: Heads,
    /// Query rows and keys of each sequence.
    pub sequences: Vec<Sequence>,
    /// Key tiles that are visited.
    pub visits: Visits,
    /// Form of the kernel; `None` is the plan's choice.
    pub form: Option<Form>,
    /// Whether log-sum-exps are written.
    pub lse: bool,
}

/// Key tiles that every query tile visits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visits {
    /// All, without lists.
    All,
    /// All but the suffix after `near` keys, where it is one of `every` tiles.
    Pruned {
        /// Keys of the suffix that are visited anyway.
        near: usize,
        /// Distance of the visited tiles after them.
        every: usize,
    },
    /// One tile of this number, beginning with the first.
    Every(usize),
}

impl Visits {
    /// Returns the list of each query tile.
    fn lists(self, batch: &Batch) -> Result<TileLists> {
        match self {
            Visits::All => TileLists::dense(batch),
            Visits::Pruned { near, every } => TileLists::pruned_suffix(batch, near, every),
            Visits::Every(every) => {
                let list = |s: &Sequence| (0..s.key_tiles() as i32).step_by(every).collect::<Vec<_>>();
                let query_tiles = batch.max_sequence_rows.div_ceil(QUERY_TILE);
                let lists = batch.sequences.iter().flat_map(|s| vec![list(s); query_tiles]);
                TileLists::from_lists(batch, None, &lists.collect::<Vec<_>>())
            }
        }
    }
}

/// Keys and values of one segment.
struct CacheSegment<T> {
    k: HostDevice<T>,
    v: HostDevice<T>,
    start: HostDevice<i32>,
    len: Buffer<i32>,
}

/// Queries, keys, values and results of sequences.
pub struct Sequences<T> {
    stream: Stream,
    shape: Shape,
    max_sequence_rows: usize,
    lists: TileLists,
    tiles: Option<DeviceTiles>,
    splits: usize,
    q: HostDevice<T>,
    cu_rows: Buffer<i32>,
    parts: [CacheSegment<T>; 3],
    out: Buffer<T>,
    lse: Option<Buffer<f32>>,
    workspace: Buffer<f32>,
}

impl<T: Float> Sequences<T> {
    /// Uploads random queries, keys and values.
    pub fn new(stream: &Stream, shape: Shape) -> Result<Sequences<T>> {
        let Shape { heads, sequences, visits, lse, .. } = &shape;
        let mut random = Random(11);
        let sums = |len: &dyn Fn(&Sequence) -> usize| {
            let mut sums = vec![0];
            sequences.iter().for_each(|s| sums.push(sums[sums.len() - 1] + len(s) as i32));
            sums
        };
        let rows: usize = sequences.iter().map(|s| s.rows).sum();
        let max_sequence_rows = sequences.iter().map(|s| s.rows).max().unwrap_or(0);
        let (width, kv_width) = (heads.q_width(), heads.kv_width());
        let mut part = |i: usize| -> Result<CacheSegment<T>> {
            let starts = sums(&|s| s.keys[i]);
            let len = starts[sequences.len()] as usize * kv_width;
            Ok(CacheSegment {
                k: HostDevice::new(stream, random.outliers(len, 1.0))?,
                v: HostDevice::new(stream, random.outliers(len, 1.0))?,
                start: HostDevice::new(stream, starts)?,
                len: stream.upload(&sequences.iter().map(|s| s.keys[i] as i32).collect::<Vec<_>>())?,
            })
        };
        let parts = [part(0)?, part(1)?, part(2)?];
        let lists = visits.lists(&Batch { sequences, max_sequence_rows })?;
        let splits = attention::splits(max_sequence_rows, *heads, stream.device().multiprocessors()?);
        Ok(Sequences {
            stream: stream.clone(),
            max_sequence_rows,
            tiles: (*visits != Visits::All).then(|| lists.upload(stream)).transpose()?,
            lists,
            splits,
            q: HostDevice::new(stream, random.outliers(rows * width, 1.0))?,
            cu_rows: stream.upload(&sums(&|s| s.rows))?,
            parts,
            out: stream.alloc(rows * width)?,
            lse: lse.then(|| stream.alloc(rows * heads.num_heads)).transpose()?,
            workspace: stream.alloc(attention::workspace_len(rows, *heads, splits))?,
            shape,
        })
    }

    /// Returns the range of keys of each tile that the rows of a query tile visit.
    fn visited_keys(&self, sequence: usize, query_tile: usize) -> impl Iterator<Item = Range<usize>> {
        let keys = self.shape.sequences[sequence].num_keys();
        let range = move |tile: &i32| {
            let first = *tile as usize * KEY_TILE;
            first..keys.min(first + KEY_TILE)
        };
        self.lists.list(sequence, query_tile, 0).iter().map(range)
    }

    /// Returns the number of keys that the rows of a query tile visit.
    fn num_visited(&self, sequence: usize, query_tile: usize) -> usize {
        self.visited_keys(sequence, query_tile).map(|keys| keys.len()).sum()
    }

    /// Returns the keys and values that the rows of a query tile visit, of one key/value head.
    fn visited(&self, sequence: usize, query_tile: usize, kv_head: usize) -> Vec<(Vec<f64>, Vec<f64>)> {
        let Heads { num_kv_heads, head_dim, .. } = self.shape.heads;
        let mut all = Vec::new();
        for (i, part) in self.parts.iter().enumerate() {
            let start = part.start.host[sequence] as usize;
            all.extend((start..start + self.shape.sequences[sequence].keys[i]).map(|row| (part, row)));
        }
        let of_head = |matrix: &HostDevice<T>, row: usize| {
            widened(&matrix.host[(row * num_kv_heads + kv_head) * head_dim..][..head_dim])
        };
        let keys = self.visited_keys(sequence, query_tile).flat_map(|keys| &all[keys]);
        keys.map(|(part, row)| (of_head(&part.k, *row), of_head(&part.v, *row))).collect()
    }

    /// Calls `compare` for each of `rows` and of `heads`, with what it visits.
    fn for_each(&self, rows: &[usize], heads: &[usize], mut compare: impl FnMut(usize, usize, &[(&[f64], &[f64])])) {
        let Heads { num_heads, num_kv_heads, .. } = self.shape.heads;
        let group = num_heads / num_kv_heads;
        let mut first = 0;
        for (sequence, of) in self.shape.sequences.iter().enumerate() {
            for (query_tile, start) in (first..first + of.rows).step_by(QUERY_TILE).enumerate() {
                let tile = start..(first + of.rows).min(start + QUERY_TILE);
                let rows: Vec<usize> = rows.iter().copied().filter(|row| tile.contains(row)).collect();
                for kv_head in 0..num_kv_heads {
                    let heads = heads.iter().copied().filter(|head| head / group == kv_head);
                    let compared: Vec<_> = heads.flat_map(|head| rows.iter().map(move |row| (*row, head))).collect();
                    if compared.is_empty() {
                        continue;
                    }
                    let visited = self.visited(sequence, query_tile, kv_head);
                    let visited: Vec<_> = visited.iter().map(|(k, v)| (&k[..], &v[..])).collect();
                    compared.into_iter().for_each(|(row, head)| compare(row, head, &visited));
                }
            }
            first += of.rows;
        }
    }
}

impl<T: Float> Case for Sequences<T> {
    /// Keys and values that any row visits; queries and results.
    fn bytes(&self) -> usize {
        let most = |sequence| (0..self.lists.query_tiles).map(|tile| self.num_visited(sequence, tile)).max();
        let keys: usize = (0..self.shape.sequences.len()).map(|sequence| most(sequence).unwrap_or(0)).sum();
        (2 * keys * self.shape.heads.kv_width() + 2 * self.out.len()) * size_of::<T>()
    }

    /// Two products of each row with its visited keys and values.
    fn flops(&self) -> u64 {
        let mut pairs = 0;
        for (sequence, of) in self.shape.sequences.iter().enumerate() {
            for (tile, start) in (0..of.rows).step_by(QUERY_TILE).enumerate() {
                pairs += QUERY_TILE.min(of.rows - start) * self.num_visited(sequence, tile);
            }
        }
        4 * (pairs * self.shape.heads.q_width()) as u64
    }

    fn launch(&mut self) -> Result<()> {
        let Sequences { shape, q, cu_rows, parts, out, lse, workspace, .. } = self;
        let heads = shape.heads;
        let matrix = |buffer, stride| attention::Rows { buffer, first: 0, stride };
        let segments = parts.each_ref().map(|CacheSegment { k, v, start, len }| {
            let [k, v] = [k, v].map(|rows| matrix(&rows.device, heads.kv_width()));
            (!k.buffer.is_empty()).then_some(Segment { k, v, start: Some(&start.device), len })
        });
        let args = Attention {
            heads,
            q: matrix(&q.device, heads.q_width()),
            cu_rows,
            max_sequence_rows: self.max_sequence_rows,
            segments,
            tiles: self.tiles.as_ref().map(DeviceTiles::tiles),
            scale: 1.0 / (heads.head_dim as f32).sqrt(),
            max_splits: self.splits,
            form: shape.form,
            out,
            lse: lse.as_mut(),
            workspace,
        };
        attention::launch(&self.stream, args)
    }

    /// Compares all heads of all rows, or a few of a few.
    fn check(&self, rows: Rows) -> Result<Vec<ErrorBound>> {
        let Heads { num_heads, head_dim, .. } = self.shape.heads;
        let (out, lse) = (self.out.read()?, self.lse.as_ref().map(Buffer::read).transpose()?);
        let scale = 1.0 / (head_dim as f64).sqrt();
        let (mut elements, mut sums) = (Vec::new(), Vec::new());
        let all = self.shape.sequences.iter().map(|s| s.rows).sum();
        self.for_each(&rows.of(all), &rows.of(num_heads), |row, head, visited| {
            let index = row * num_heads + head;
            let head = index * head_dim..(index + 1) * head_dim;
            let (want, want_lse) = attend(&widened(&self.q.host[head.clone()]), visited, scale);
            let largest = want.iter().fold(T::MIN_POSITIVE, |largest, x| largest.max(x.abs()));
            elements.extend(widened(&out[head]).into_iter().zip(want).map(|(got, want)| (got, want, largest)));
            sums.extend(lse.as_ref().map(|lse| (f64::from(lse[index]), want_lse, 1.0 + want_lse.abs() / 10.0)));
        });
        let epsilons = EPSILONS * T::EPSILON;
        let mut bounds = vec![ErrorBound::within("result, relative to the largest of its row", elements, epsilons)];
        if self.shape.lse {
            bounds.push(ErrorBound::within("log-sum-exp", sums, 1e-5));
        }
        Ok(bounds)
    }

    fn outputs(&mut self) -> Vec<Output<'_>> {
        let lse = self.lse.as_mut().map(|lse| Output::new("log-sum-exps", lse));
        [Output::new("result", &mut self.out)].into_iter().chain(lse).collect()
    }
}
