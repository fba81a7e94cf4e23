//! Attention of a block over a cache in three segments; and of ragged sequences with grouped heads, tile lists and
//! log-sum-exps.

use super::super::case::{Case, Entry, ErrorBound, Float, HostDevice, Rng, widened};
use super::pick;
use dllm_kernels::Result;
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::attention::{self, Attention, Heads, KEY_TILE, QUERY_TILE, Rows, Segment};
use dllm_kernels::ops::tiles::{Batch, DeviceTiles, Sequence, TileLists};
use dllm_kernels::reference::attention::attend;
use half::{bf16, f16};

/// Bound of a result, relative to the largest of its row and head, in epsilons of its type: its own rounding, and that of the
/// weights before they are multiplied by the values.
const EPSILONS: f64 = 1.3;

pub fn entries(small: bool) -> Vec<Entry> {
    let (num_heads, rows, keys) = pick(small, (32, 32, [736, 32, 256]), (4, 8, [120, 8, 64]));
    let llada = Heads { num_heads, num_kv_heads: num_heads, head_dim: 128 };
    let groups = Heads { num_heads: 6, num_kv_heads: 2, head_dim: 64 };
    let total: usize = keys.iter().sum();
    let shape = format!("1x{rows} {num_heads}/{num_heads}x128, {total} keys in 3 parts");
    vec![
        Entry::new::<bf16, _>("attention", shape, move |stream| {
            Sequences::<bf16>::new(stream, llada, &[Sequence { rows, keys }], None)
        }),
        Entry::new::<f16, _>("attention", "5 and 130 rows 6/2x64, pruned suffix".into(), move |stream| {
            let sequences = [Sequence { rows: 5, keys: [70, 5, 330] }, Sequence { rows: 130, keys: [0, 130, 33] }];
            Sequences::<f16>::new(stream, groups, &sequences, Some((60, 3)))
        }),
    ]
}

/// Keys and values of one segment.
struct CacheSegment<T> {
    k: HostDevice<T>,
    v: HostDevice<T>,
    start: HostDevice<i32>,
    len: Buffer<i32>,
}

struct Sequences<T> {
    stream: Stream,
    heads: Heads,
    sequences: Vec<Sequence>,
    max_sequence_rows: usize,
    lists: TileLists,
    tiles: Option<DeviceTiles>,
    splits: usize,
    q: HostDevice<T>,
    cu_rows: Buffer<i32>,
    parts: [CacheSegment<T>; 3],
    out: Buffer<T>,
    lse: Buffer<f32>,
    workspace: Buffer<f32>,
}

impl<T: Float> Sequences<T> {
    /// Makes the sequences. With `pruned` = (near, every), only `near` keys and every `every`-th tile of the suffix are
    /// visited.
    fn new(
        stream: &Stream,
        heads: Heads,
        sequences: &[Sequence],
        pruned: Option<(usize, usize)>,
    ) -> Result<Sequences<T>> {
        let mut rng = Rng::new(11);
        let sums = |len: &dyn Fn(&Sequence) -> usize| {
            let mut sums = vec![0];
            sequences.iter().for_each(|s| sums.push(sums[sums.len() - 1] + len(s) as i32));
            sums
        };
        let rows: usize = sequences.iter().map(|s| s.rows).sum();
        let max_sequence_rows = sequences.iter().map(|s| s.rows).max().unwrap_or(0);
        let (width, kv_width) = (heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim);
        let mut part = |i: usize| -> Result<CacheSegment<T>> {
            let starts = sums(&|s| s.keys[i]);
            let len = starts[sequences.len()] as usize * kv_width;
            Ok(CacheSegment {
                k: HostDevice::new(stream, rng.values(len, 1.5))?,
                v: HostDevice::new(stream, rng.values(len, 1.0))?,
                start: HostDevice::new(stream, starts)?,
                len: stream.upload(&sequences.iter().map(|s| s.keys[i] as i32).collect::<Vec<_>>())?,
            })
        };
        let parts = [part(0)?, part(1)?, part(2)?];
        let batch = Batch { sequences, max_sequence_rows };
        let lists = match pruned {
            None => TileLists::dense(&batch)?,
            Some((near, every)) => TileLists::pruned_suffix(&batch, near, every)?,
        };
        let multiprocessors = stream.device().multiprocessors()?;
        let splits = attention::splits(max_sequence_rows, heads, multiprocessors);
        Ok(Sequences {
            stream: stream.clone(),
            heads,
            sequences: sequences.to_vec(),
            max_sequence_rows,
            tiles: pruned.map(|_| lists.upload(stream)).transpose()?,
            lists,
            splits,
            q: HostDevice::new(stream, rng.values(rows * width, 1.5))?,
            cu_rows: stream.upload(&sums(&|s| s.rows))?,
            parts,
            out: stream.alloc(rows * width)?,
            lse: stream.alloc(rows * heads.num_heads)?,
            workspace: stream.alloc(attention::workspace_len(rows, heads, splits))?,
        })
    }

    /// Returns the keys and values that the rows of a query tile visit, of one key/value head.
    fn visited(&self, sequence: usize, query_tile: usize, kv_head: usize) -> Vec<(Vec<f64>, Vec<f64>)> {
        let Heads { num_kv_heads, head_dim, .. } = self.heads;
        let mut all = Vec::new();
        for (i, part) in self.parts.iter().enumerate() {
            let start = part.start.host[sequence] as usize;
            all.extend((start..start + self.sequences[sequence].keys[i]).map(|row| (part, row)));
        }
        let tiles = self.lists.list(sequence, query_tile, kv_head).iter();
        let rows_of_tile = |tile: &i32| {
            let first = *tile as usize * KEY_TILE;
            &all[first..all.len().min(first + KEY_TILE)]
        };
        let offset = |row: usize| (row * num_kv_heads + kv_head) * head_dim;
        let of_head = |matrix: &HostDevice<T>, row: usize| widened(&matrix.host[offset(row)..offset(row) + head_dim]);
        tiles.flat_map(rows_of_tile).map(|(part, row)| (of_head(&part.k, *row), of_head(&part.v, *row))).collect()
    }
}

impl<T: Float> Case for Sequences<T> {
    /// Keys and values that any row visits; queries and results.
    fn bytes(&self) -> usize {
        let visited =
            |sequence: usize| (0..self.lists.query_tiles).map(|t| self.lists.list(sequence, t, 0).len()).max();
        let keys = |(s, of): (usize, &Sequence)| (visited(s).unwrap_or(0) * KEY_TILE).min(of.num_keys());
        let keys: usize = self.sequences.iter().enumerate().map(keys).sum();
        (2 * keys * self.heads.num_kv_heads * self.heads.head_dim + 2 * self.out.len()) * size_of::<T>()
    }

    fn launch(&mut self) -> Result<()> {
        let Sequences { heads, q, cu_rows, parts, out, lse, workspace, .. } = self;
        let matrix = |buffer, heads: usize, head_dim| Rows { buffer, first: 0, stride: heads * head_dim };
        let segments = parts.each_ref().map(|CacheSegment { k, v, start, len }| {
            let rows = |both| matrix(both, heads.num_kv_heads, heads.head_dim);
            Some(Segment { k: rows(&k.device), v: rows(&v.device), start: Some(&start.device), len })
        });
        let args = Attention {
            heads: *heads,
            q: matrix(&q.device, heads.num_heads, heads.head_dim),
            cu_rows,
            max_sequence_rows: self.max_sequence_rows,
            segments,
            tiles: self.tiles.as_ref().map(DeviceTiles::tiles),
            scale: 1.0 / (heads.head_dim as f32).sqrt(),
            max_splits: self.splits,
            form: None,
            out,
            lse: Some(lse),
            workspace,
        };
        attention::launch(&self.stream, args)
    }

    fn check(&self) -> Result<Vec<ErrorBound>> {
        let Heads { num_heads, num_kv_heads, head_dim } = self.heads;
        let (out, lse) = (widened(&self.out.read()?), self.lse.read()?);
        let scale = 1.0 / (head_dim as f64).sqrt();
        let (mut elements, mut sums) = (Vec::new(), Vec::new());
        let mut first = 0;
        for (sequence, of) in self.sequences.iter().enumerate() {
            for (query_tile, rows) in (0..of.rows).step_by(QUERY_TILE).enumerate() {
                for kv_head in 0..num_kv_heads {
                    let visited = self.visited(sequence, query_tile, kv_head);
                    let visited: Vec<(&[f64], &[f64])> = visited.iter().map(|(k, v)| (&k[..], &v[..])).collect();
                    let group = num_heads / num_kv_heads;
                    for row in first + rows..first + of.rows.min(rows + QUERY_TILE) {
                        for head in kv_head * group..(kv_head + 1) * group {
                            let index = row * num_heads + head;
                            let elements_of_head = index * head_dim..(index + 1) * head_dim;
                            let (want, want_lse) =
                                attend(&widened(&self.q.host[elements_of_head.clone()]), &visited, scale);
                            let largest = want.iter().fold(T::MIN_POSITIVE, |largest, x| largest.max(x.abs()));
                            elements.extend(
                                out[elements_of_head].iter().zip(want).map(|(got, want)| (*got, want, largest)),
                            );
                            sums.push((f64::from(lse[index]), want_lse, 1.0 + want_lse.abs() / 10.0));
                        }
                    }
                }
            }
            first += of.rows;
        }
        Ok(vec![
            ErrorBound::within(
                "result, relative to the largest of its row",
                elements.into_iter(),
                EPSILONS * T::EPSILON,
            ),
            ErrorBound::within("log-sum-exp", sums.into_iter(), 1e-5),
        ])
    }
}
