//! Compares attention over tile lists with the reference over the keys of the same mask. Keys and values that no list visits are
//! infinite or NaN.

use crate::common::{Float, Random, device, on_device, stream, widened};
use dllm_kernels::gpu::{Buffer, Stream};
use dllm_kernels::ops::attention::{self, Attention, Heads, KEY_TILE, QUERY_TILE, Rows, Segment, Tiles};
use dllm_kernels::ops::tiles::{Batch, DeviceTiles, Sequence, TileLists};
use dllm_kernels::reference::attention::attend;
use half::{bf16, f16};

on_device! {
    dense_lists,
    sliding_windows,
    pruned_suffixes,
    best_tiles,
    lists_of_the_caller,
    lists_change_under_a_graph,
    lists_that_do_not_fit_are_errors,
}

const HEADS: Heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 32 };
const KV_WIDTH: usize = HEADS.num_kv_heads * HEADS.head_dim;
const SCALE: f32 = 0.177;

/// Entry of a list: sequence, query tile, key/value head, key tile.
type Visit = (usize, usize, usize, usize);

#[derive(Clone)]
struct Case<T> {
    sequences: Vec<Sequence>,
    max_sequence_rows: usize,
    /// Queries, `[rows, num_heads, head_dim]`.
    q: Vec<T>,
    /// Keys of each sequence over all segments, `[keys, num_kv_heads, head_dim]`.
    k: Vec<Vec<T>>,
    v: Vec<Vec<T>>,
}

impl<T: Float> Case<T> {
    fn new(seed: u64, sequences: &[(usize, [usize; 3])]) -> Case<T> {
        let random = &mut Random(seed);
        let sequences: Vec<_> = sequences.iter().map(|(rows, keys)| Sequence { rows: *rows, keys: *keys }).collect();
        let rows = sequences.iter().map(|s| s.rows).sum::<usize>();
        let mut keys = || sequences.iter().map(|s| random.floats(s.num_keys() * KV_WIDTH)).collect();
        let [k, v] = [keys(), keys()];
        let q = random.floats(rows * HEADS.num_heads * HEADS.head_dim);
        let max_sequence_rows = sequences.iter().map(|s| s.rows).max().unwrap();
        Case { sequences, max_sequence_rows, q, k, v }
    }

    /// Sequences with lengths that fill no tile, and with an empty prefix, suffix or block.
    fn mixed(seed: u64) -> Case<T> {
        Case::new(seed, &[(150, [100, 150, 210]), (3, [0, 3, 130]), (0, [64, 0, 10]), (40, [200, 40, 0])])
    }

    fn batch(&self) -> Batch<'_> {
        Batch { sequences: &self.sequences, max_sequence_rows: self.max_sequence_rows }
    }

    fn all_visits(&self) -> impl Iterator<Item = Visit> {
        let query_tiles = self.max_sequence_rows.div_ceil(QUERY_TILE);
        let visits = move |(s, sequence): (usize, &Sequence)| {
            let tiles = sequence.key_tiles();
            let lists = (0..query_tiles * HEADS.num_kv_heads).map(|l| (l / HEADS.num_kv_heads, l % HEADS.num_kv_heads));
            lists.flat_map(move |(query_tile, head)| (0..tiles).map(move |tile| (s, query_tile, head, tile)))
        };
        self.sequences.iter().enumerate().flat_map(visits)
    }

    /// Returns the case with infinities and NaN in all keys and values that `query_tile` does not visit, in every sequence.
    fn poisoned(&self, query_tile: usize, mask: impl Fn(Visit) -> bool) -> Case<T> {
        let mut case = self.clone();
        let bad = [f32::NAN, f32::INFINITY, -f32::INFINITY, f32::NAN].map(T::of);
        for (s, q, head, tile) in self.all_visits().filter(|visit| visit.1 == query_tile && !mask(*visit)) {
            assert_eq!(q, query_tile);
            for key in tile * KEY_TILE..self.sequences[s].num_keys().min((tile + 1) * KEY_TILE) {
                for i in key * KV_WIDTH + head * HEADS.head_dim..key * KV_WIDTH + (head + 1) * HEADS.head_dim {
                    case.k[s][i] = bad[(i + key) % 4];
                    case.v[s][i] = bad[(i + key + 1) % 4];
                }
            }
        }
        case
    }

    /// Compares the rows of `query_tile` with the reference over the keys of the tiles in the mask.
    fn check(&self, (out, lse): &(Vec<T>, Vec<f32>), query_tile: usize, mask: impl Fn(Visit) -> bool, what: &str) {
        let Heads { num_heads, num_kv_heads, head_dim } = HEADS;
        let tolerance = if T::NAME == "bf16" { 1e-2 } else { 2e-3 };
        let mut first = 0;
        for (s, sequence) in self.sequences.iter().enumerate() {
            let [k, v] = [&self.k[s], &self.v[s]].map(|x| widened(x));
            for head in 0..num_heads {
                let kv_head = head / (num_heads / num_kv_heads);
                let seen: Vec<_> = (0..sequence.num_keys())
                    .filter(|key| mask((s, query_tile, kv_head, key / KEY_TILE)))
                    .map(|key| key * KV_WIDTH + kv_head * head_dim)
                    .map(|at| (&k[at..at + head_dim], &v[at..at + head_dim]))
                    .collect();
                for row in query_tile * QUERY_TILE..sequence.rows.min((query_tile + 1) * QUERY_TILE) {
                    let place = (first + row) * num_heads + head;
                    let at = place * head_dim..(place + 1) * head_dim;
                    let (want, want_lse) = attend(&widened(&self.q[at.clone()]), &seen, SCALE.into());
                    let largest = want.iter().fold(0.0f64, |m, x| m.max(x.abs()));
                    let what = format!("{} {what}: sequence {s} row {row} head {head}", T::NAME);
                    for (got, want) in out[at].iter().zip(&want) {
                        assert!((got.f64() - want).abs() <= tolerance * largest, "{what}: {got:?} {want}");
                    }
                    let got = f64::from(lse[place]);
                    let same = got == want_lse || (got - want_lse).abs() < 1e-5 + 1e-6 * want_lse.abs();
                    assert!(same, "{what}: lse {got} {want_lse}");
                }
            }
            first += sequence.rows;
        }
    }
}

/// Keys and values of a segment on the device.
struct DeviceSegment<T> {
    k: Buffer<T>,
    v: Buffer<T>,
    start: Buffer<i32>,
    len: Buffer<i32>,
}

/// Inputs and results on the device.
struct Loaded<T> {
    q: Buffer<T>,
    cu_rows: Buffer<i32>,
    segments: [DeviceSegment<T>; 3],
    max_sequence_rows: usize,
    splits: usize,
    out: Buffer<T>,
    lse: Buffer<f32>,
    workspace: Buffer<f32>,
}

impl<T: Float> Loaded<T> {
    fn new(stream: &Stream, case: &Case<T>, splits: usize) -> Loaded<T> {
        let mut cu_rows = vec![0];
        case.sequences.iter().for_each(|s| cu_rows.push(cu_rows.last().unwrap() + s.rows as i32));
        let segment = |i: usize| {
            let (mut k, mut v, mut starts, mut lens) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            for (s, sequence) in case.sequences.iter().enumerate() {
                let before: usize = sequence.keys[..i].iter().sum();
                let keys = before * KV_WIDTH..(before + sequence.keys[i]) * KV_WIDTH;
                starts.push((k.len() / KV_WIDTH) as i32);
                lens.push(sequence.keys[i] as i32);
                k.extend_from_slice(&case.k[s][keys.clone()]);
                v.extend_from_slice(&case.v[s][keys]);
            }
            let [k, v] = [k, v].map(|x| stream.upload(&x).unwrap());
            DeviceSegment { k, v, start: stream.upload(&starts).unwrap(), len: stream.upload(&lens).unwrap() }
        };
        let rows = *cu_rows.last().unwrap() as usize;
        Loaded {
            q: stream.upload(&case.q).unwrap(),
            cu_rows: stream.upload(&cu_rows).unwrap(),
            segments: [segment(0), segment(1), segment(2)],
            max_sequence_rows: case.max_sequence_rows,
            splits,
            out: stream.alloc(case.q.len()).unwrap(),
            lse: stream.alloc(rows * HEADS.num_heads).unwrap(),
            workspace: stream.alloc(attention::workspace_len(rows, HEADS, splits)).unwrap(),
        }
    }

    fn launch(&mut self, stream: &Stream, tiles: Option<Tiles>) -> dllm_kernels::Result<()> {
        let kv = |buffer| Rows { buffer, first: 0, stride: KV_WIDTH };
        let segments = [0, 1, 2].map(|i: usize| {
            let DeviceSegment { k, v, start, len } = &self.segments[i];
            Some(Segment { k: kv(k), v: kv(v), start: Some(start), len })
        });
        let attention = Attention {
            heads: HEADS,
            q: Rows { buffer: &self.q, first: 0, stride: HEADS.num_heads * HEADS.head_dim },
            cu_rows: &self.cu_rows,
            max_sequence_rows: self.max_sequence_rows,
            segments,
            tiles,
            scale: SCALE,
            max_splits: self.splits,
            form: None,
            out: &mut self.out,
            lse: Some(&mut self.lse),
            workspace: &mut self.workspace,
        };
        attention::launch(stream, attention)
    }

    fn read(&self) -> (Vec<T>, Vec<f32>) {
        (self.out.read().unwrap(), self.lse.read().unwrap())
    }
}

/// Checks each query tile, with and without splits, with poison in the tiles that it does not visit.
fn run_all<T: Float>(case: &Case<T>, lists: &TileLists, mask: impl Fn(Visit) -> bool, what: &str) {
    let stream = stream();
    lists.validate(&case.batch()).unwrap();
    let tiles = lists.upload(&stream).unwrap();
    for splits in [1, 3] {
        for query_tile in 0..lists.query_tiles {
            let poisoned = case.poisoned(query_tile, &mask);
            let mut loaded = Loaded::new(&stream, &poisoned, splits);
            loaded.launch(&stream, Some(tiles.tiles())).unwrap();
            case.check(&loaded.read(), query_tile, &mask, &format!("{what}, {splits} splits"));
        }
    }
}

/// Whether a tile has a key that is `wanted`.
fn any_key(sequence: &Sequence, tile: usize, wanted: impl Fn(usize) -> bool) -> bool {
    (tile * KEY_TILE..sequence.num_keys().min((tile + 1) * KEY_TILE)).any(wanted)
}

fn dense_lists() {
    fn check<T: Float>() {
        let case = Case::<T>::mixed(1);
        let lists = TileLists::dense(&case.batch()).unwrap();
        run_all(&case, &lists, |_| true, "dense");
        // Dense lists give the same bits as no lists.
        let stream = stream();
        let tiles = lists.upload(&stream).unwrap();
        let [with, without] = [Some(tiles.tiles()), None].map(|tiles| {
            let mut loaded = Loaded::new(&stream, &case, 2);
            loaded.launch(&stream, tiles).unwrap();
            loaded.read()
        });
        assert!(with == without, "{}: lists change bits", T::NAME);
    }
    check::<bf16>();
    check::<f16>();
}

fn sliding_windows() {
    fn check<T: Float>() {
        let case = Case::<T>::mixed(2);
        for window in [0, 30, 100] {
            let near = |(s, query_tile, _, tile): Visit| {
                let sequence = &case.sequences[s];
                let rows = query_tile * QUERY_TILE..sequence.rows.min((query_tile + 1) * QUERY_TILE);
                rows.into_iter()
                    .any(|row| any_key(sequence, tile, |key| (sequence.keys[0] + row).abs_diff(key) <= window))
            };
            let lists = TileLists::sliding_window(&case.batch(), window).unwrap();
            run_all(&case, &lists, near, &format!("window {window}"));
        }
    }
    check::<bf16>();
}

fn pruned_suffixes() {
    fn check<T: Float>() {
        let case = Case::<T>::new(3, &[(32, [100, 32, 600]), (20, [0, 20, 300]), (32, [300, 32, 0]), (5, [0, 5, 1])]);
        for (near, every) in [(0, 0), (0, 2), (60, 3), (200, 1)] {
            let kept = |(s, _, _, tile): Visit| {
                let sequence = &case.sequences[s];
                let suffix = sequence.keys[0] + sequence.keys[1];
                let is_near = |tile: usize| any_key(sequence, tile, |key| key < suffix + near);
                // Number of this tile among the far tiles, from 1.
                let number = (0..=tile).filter(|tile| !is_near(*tile)).count();
                is_near(tile) || (every > 0 && number % every == 0)
            };
            let lists = TileLists::pruned_suffix(&case.batch(), near, every).unwrap();
            run_all(&case, &lists, kept, &format!("near {near}, every {every}"));
        }
    }
    check::<bf16>();
}

fn best_tiles() {
    fn check<T: Float>() {
        let case = Case::<T>::mixed(4);
        for (per_head, k) in [(None, 0), (None, 1), (Some(2), 2), (Some(2), 3)] {
            let (key_tiles, query_tiles, heads) = (9, 2, per_head.unwrap_or(1));
            let mut random = Random(5);
            let scores: Vec<f32> =
                (0..4 * query_tiles * heads * key_tiles).map(|_| random.below(4) as f32 - 2.0).collect();
            let best = |(s, query_tile, head, tile): Visit| {
                let head = if per_head.is_some() { head } else { 0 };
                let scores = &scores[((s * query_tiles + query_tile) * heads + head) * key_tiles..];
                let before =
                    |other: &usize| scores[*other] > scores[tile] || scores[*other] == scores[tile] && *other < tile;
                (0..case.sequences[s].key_tiles()).filter(before).count() < k
            };
            let lists = TileLists::top_k(&case.batch(), per_head, k, &scores, key_tiles).unwrap();
            run_all(&case, &lists, best, &format!("best {k}, heads {per_head:?}"));
        }
    }
    check::<bf16>();
}

/// Random subsets of tiles in random order, with more lists than sequences have query tiles.
fn lists_of_the_caller() {
    fn check<T: Float>() {
        let mut case = Case::<T>::mixed(6);
        case.max_sequence_rows = 260;
        let random = &mut Random(7);
        for per_head in [None, Some(2)] {
            let mut lists = Vec::new();
            for sequence in &case.sequences {
                for _ in 0..3 * per_head.unwrap_or(1) {
                    let tiles = sequence.key_tiles();
                    let kept = random.below(tiles + 1);
                    lists.push(random.distinct(kept, tiles));
                }
            }
            let of = |s: usize, query_tile: usize, head: usize| match per_head {
                None => &lists[s * 3 + query_tile],
                Some(_) => &lists[(s * 3 + query_tile) * 2 + head],
            };
            let made = TileLists::from_lists(&case.batch(), per_head, &lists).unwrap();
            let visited = |(s, query_tile, head, tile): Visit| of(s, query_tile, head).contains(&(tile as i32));
            run_all(&case, &made, visited, "the caller's");
        }
    }
    check::<bf16>();
    check::<f16>();
}

/// Replays of a captured launch use the tile lists that are on the device then.
fn lists_change_under_a_graph() {
    device().preload().unwrap();
    let stream = stream();
    let case = Case::<bf16>::mixed(8);
    let batch = case.batch();
    let dense = TileLists::dense(&batch).unwrap();
    let none = TileLists { offsets: vec![0; dense.offsets.len()], indices: Vec::new(), ..dense.clone() };
    let mut tiles = none.upload_with_room(&stream, dense.indices.len()).unwrap();
    let mut loaded = Loaded::new(&stream, &case, 2);
    let graph = stream.capture(|| loaded.launch(&stream, Some(tiles.tiles()))).unwrap();
    let window = TileLists::sliding_window(&batch, 10).unwrap();
    for lists in [&none, &dense, &window, &none] {
        tiles.write(lists).unwrap();
        // SAFETY: the buffers are alive and belong to this stream.
        unsafe { graph.launch() }.unwrap();
        let got = loaded.read();
        for query_tile in 0..lists.query_tiles {
            let visited = |(s, q, head, tile): Visit| lists.list(s, q, head).contains(&(tile as i32));
            case.check(&got, query_tile, visited, "replayed");
        }
    }
}

fn lists_that_do_not_fit_are_errors() {
    let stream = stream();
    let case = Case::<f16>::mixed(9);
    let dense = TileLists::dense(&case.batch()).unwrap();
    let refused = |result: dllm_kernels::Result<DeviceTiles>, says: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    let most = dense.indices.len();
    refused(dense.upload_with_room(&stream, most - 1), &format!("tile_indices: expected at most {} tiles", most - 1));
    let write = |lists: &TileLists| {
        let mut tiles = dense.upload(&stream).unwrap();
        tiles.write(lists).map(|()| tiles)
    };
    let more = Batch { max_sequence_rows: 300, ..case.batch() };
    let more = TileLists::dense(&more).unwrap();
    refused(write(&more), "tile_offsets: expected 8 lists, 2 a sequence, shared by all heads, found 12 lists, 3 a");
    let heads = TileLists::from_lists(&case.batch(), Some(2), &[[0i32; 0]; 16]).unwrap();
    refused(write(&heads), "found 16 lists, 2 a sequence, for 2 heads");
    // The launch refuses lists for fewer rows than its own `max_sequence_rows`.
    let tiles = dense.upload(&stream).unwrap();
    let mut loaded = Loaded::new(&stream, &Case { max_sequence_rows: 300, ..case.clone() }, 1);
    let error = loaded.launch(&stream, Some(tiles.tiles())).unwrap_err().to_string();
    assert!(error.contains("tile_offsets: expected 13 elements, found 9"), "{error}");
}
