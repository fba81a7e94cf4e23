//! Tensors of a checkpoint, memory-mapped from its safetensors files and read in place.

use crate::error::{Error, Result};
use crate::tensor::Storage;
pub use crate::tensor::{Dtype, Tensor};
use memmap2::Mmap;
use safetensors::tensor::Metadata;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Tensors of a checkpoint by name. Cloning copies no tensor data.
#[derive(Clone, Debug)]
pub struct Weights {
    source: PathBuf,
    tensors: HashMap<String, Entry>,
}

/// Named entry of a safetensors file.
#[derive(Clone, Debug)]
struct Entry {
    /// The file, for errors.
    path: Arc<Path>,
    contents: Contents,
}

#[derive(Clone, Debug)]
enum Contents {
    Tensor(Tensor),
    /// Tensor of an unsupported element type: an error only when the model needs it.
    Unsupported(String),
}

impl Weights {
    /// Maps the weight files of a checkpoint directory: the shards that `model.safetensors.index.json` names, else
    /// `model.safetensors`, else every `model*.safetensors`. Headers are checked against the file sizes; tensor data is not
    /// read.
    ///
    /// The files must not change while they are mapped.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] for a malformed index or header, [`Error::Tensor`] for a tensor that is missing from
    /// its shard or present in two files.
    pub fn open(dir: &Path) -> Result<Weights> {
        let mut tensors = HashMap::new();
        let index = dir.join("model.safetensors.index.json");
        if index.is_file() {
            for (shard, names) in read_index(&index)? {
                let path = dir.join(&shard);
                if !path.is_file() {
                    let message = format!("names the shard {shard:?}, which is not in {}", dir.display());
                    return Err(Error::Format { path: index, message });
                }
                let mut found = map_file(&path)?;
                for name in names {
                    let Some(tensor) = found.remove(&name) else {
                        return Err(Error::Tensor {
                            path,
                            tensor: name,
                            expected: format!("the tensor that {} places in this file", index.display()),
                            found: "no such tensor".into(),
                        });
                    };
                    tensors.insert(name, tensor);
                }
            }
        } else {
            for path in list_shards(dir)? {
                for (name, entry) in map_file(&path)? {
                    if tensors.contains_key(&name) {
                        let expected = "a tensor name that no other model*.safetensors file holds".into();
                        return Err(Error::Tensor {
                            path,
                            tensor: name,
                            expected,
                            found: "a second tensor of this name".into(),
                        });
                    }
                    tensors.insert(name, entry);
                }
            }
        }
        Ok(Weights { source: dir.to_path_buf(), tensors })
    }

    /// Creates bf16 weights from the bytes of all tensors. `list` holds name, byte range and shape of each tensor.
    pub(super) fn from_owned(source: PathBuf, bytes: Vec<u8>, list: Vec<(String, Range<usize>, Vec<usize>)>) -> Self {
        let storage = Arc::new(Storage::Owned(bytes));
        let path: Arc<Path> = source.as_path().into();
        let tensor = |(name, range, shape)| {
            let contents = Contents::Tensor(Tensor::new(Arc::clone(&storage), range, Dtype::Bf16, shape)?);
            Some((name, Entry { path: path.clone(), contents }))
        };
        Weights { source, tensors: list.into_iter().filter_map(tensor).collect() }
    }

    /// Returns the tensor `name`.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing, has another shape than `shape`, or an unsupported element type.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let mismatch = |path: &Path, expected: &str, found: String| Error::Tensor {
            path: path.to_path_buf(),
            tensor: name.to_string(),
            expected: expected.to_string(),
            found,
        };
        let expected = format!("shape {shape:?}");
        let Some(Entry { path, contents }) = self.tensors.get(name) else {
            return Err(mismatch(&self.source, &expected, "no such tensor".into()));
        };
        match contents {
            Contents::Tensor(tensor) if tensor.shape() == shape => Ok(tensor.clone()),
            Contents::Tensor(tensor) => Err(mismatch(path, &expected, format!("shape {:?}", tensor.shape()))),
            Contents::Unsupported(dtype) => Err(mismatch(path, "element type BF16, F16 or F32", dtype.clone())),
        }
    }

    /// Returns name, element type and shape of all tensors of supported element types, sorted by name.
    pub fn list(&self) -> Vec<(&str, Dtype, &[usize])> {
        let mut list = Vec::new();
        for (name, entry) in &self.tensors {
            if let Contents::Tensor(t) = &entry.contents {
                list.push((name.as_str(), t.dtype(), t.shape()));
            }
        }
        list.sort_unstable_by_key(|(name, _, _)| *name);
        list
    }

    /// Returns the total bytes of the tensors of [`Weights::list`].
    pub fn total_bytes(&self) -> usize {
        self.list().iter().map(|(_, dtype, shape)| shape.iter().product::<usize>() * dtype.size()).sum()
    }
}

/// Reads the shards of an index file, and the tensors that it places in each shard.
fn read_index(path: &Path) -> Result<BTreeMap<String, BTreeSet<String>>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let bad = |message: String| Error::Format { path: path.to_path_buf(), message };
    let index: Index = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
    let mut shards: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (tensor, shard) in index.weight_map {
        // An index is untrusted: a shard must be a file of the same directory, not a path to another one.
        if Path::new(&shard).file_name().is_none_or(|name| name != shard.as_str()) {
            return Err(bad(format!("shard {shard:?} is not a plain file name")));
        }
        shards.entry(shard).or_default().insert(tensor);
    }
    Ok(shards)
}

/// Returns `model.safetensors` of `dir` if it exists, else all its `model*.safetensors`, sorted.
fn list_shards(dir: &Path) -> Result<Vec<PathBuf>> {
    let whole = dir.join("model.safetensors");
    if whole.is_file() {
        return Ok(vec![whole]);
    }
    let mut shards = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("model") && name.ends_with(".safetensors") && path.is_file() {
            shards.push(path);
        }
    }
    shards.sort();
    if shards.is_empty() {
        return Err(Error::Format { path: dir.to_path_buf(), message: "no model*.safetensors here".into() });
    }
    Ok(shards)
}

/// Maps one safetensors file and reads its header.
fn map_file(path: &Path) -> Result<HashMap<String, Entry>> {
    let opened = File::open(path).map_err(Error::io(path))?;
    // SAFETY: a read-only mapping; the documentation of `Weights::open` forbids changes to the mapped file.
    let map = unsafe { Mmap::map(&opened) }.map_err(Error::io(path))?;
    let storage = Arc::new(Storage::Mapped(map));
    let bytes = storage.bytes();
    let (metadata, start) = read_header(bytes).map_err(|message| Error::Format {
        path: path.to_path_buf(),
        message: format!("not a whole safetensors file: {message}"),
    })?;
    let mut tensors = HashMap::new();
    let file: Arc<Path> = path.into();
    let mut insert = |name, contents| drop(tensors.insert(name, Entry { path: file.clone(), contents }));
    for (name, info) in metadata.tensors() {
        let dtype = match info.dtype {
            safetensors::Dtype::BF16 => Dtype::Bf16,
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::F32 => Dtype::F32,
            other => {
                insert(name, Contents::Unsupported(format!("{other:?}")));
                continue;
            }
        };
        let range = start + info.data_offsets.0..start + info.data_offsets.1;
        let shape = info.shape.clone();
        let found = format!("{} bytes", range.len());
        let tensor = Tensor::new(Arc::clone(&storage), range, dtype, shape).ok_or_else(|| Error::Tensor {
            path: path.to_path_buf(),
            tensor: name.clone(),
            expected: format!("the bytes of {dtype:?} {:?}", info.shape),
            found,
        })?;
        insert(name, Contents::Tensor(tensor));
    }
    Ok(tensors)
}

/// Maximum header length in bytes, as in the safetensors crate. It limits the memory for the parsed JSON.
const HEADER_LIMIT: usize = 100_000_000;

/// Reads the header of a safetensors file. Returns it with the byte offset of the tensor data, to which the offsets of the
/// tensors are relative; all of them are checked to be within the file.
///
/// `SafeTensors::deserialize` is not used, because its errors do not state the expected and the found number of bytes.
fn read_header(bytes: &[u8]) -> Result<(Metadata, usize), String> {
    let (length, rest) = bytes.split_first_chunk().ok_or("expected 8 bytes before its header, found fewer")?;
    let length = u64::from_le_bytes(*length);
    let limit = rest.len().min(HEADER_LIMIT);
    let header = usize::try_from(length).ok().and_then(|length| rest[..limit].get(..length));
    let header = header.ok_or_else(|| format!("expected a header of at most {limit} bytes, found {length}"))?;
    // Deserialising `Metadata` checks that the tensors are contiguous from offset 0 on, each as long as its shape and type
    // require.
    let metadata: Metadata = serde_json::from_slice(header)
        .map_err(|e| format!("its header: {}", bad_entry(header).unwrap_or_else(|| e.to_string())))?;
    let (expected, found) = (metadata.data_len(), rest.len() - header.len());
    if expected != found {
        return Err(format!("expected {expected} bytes of tensors, found {found}"));
    }
    Ok((metadata, bytes.len() - found))
}

/// Describes the first entry of a refused header that is wrong, with what was expected and found; `None` when the header is no
/// JSON object. The safetensors crate names the tensor in some of its errors only.
fn bad_entry(header: &[u8]) -> Option<String> {
    let Ok(Value::Object(entries)) = serde_json::from_slice(header) else { return None };
    let mut infos = Vec::new();
    for (name, entry) in &entries {
        if name == "__metadata__" {
            if let Err(e) = HashMap::<String, String>::deserialize(entry) {
                return Some(format!("{name}: {e}"));
            }
            continue;
        }
        match (field(entry, "dtype"), field(entry, "shape"), field(entry, "data_offsets")) {
            (Ok(dtype), Ok(shape), Ok(offsets)) => infos.push((offsets, name, dtype, shape)),
            (Err(e), ..) | (_, Err(e), _) | (.., Err(e)) => return Some(format!("tensor {name:?}: {e}")),
        }
    }
    infos.sort_by(|a: &([usize; 2], _, _, _), b| (a.0, a.1).cmp(&(b.0, b.1)));
    let mut end = 0;
    for ([from, to], name, dtype, shape) in infos {
        let dtype: safetensors::Dtype = dtype;
        let shape: Vec<usize> = shape;
        let tensor = format!("tensor {name:?}: expected");
        if from != end || to < from {
            return Some(format!("{tensor} data_offsets from {end} on, found [{from}, {to}]"));
        }
        let bits = shape.iter().try_fold(dtype.bitsize(), |product, size| product.checked_mul(*size));
        match bits.map(|bits| bits / 8) {
            None => return Some(format!("{tensor} a size that does not overflow, found {dtype:?} {shape:?}")),
            Some(bytes) if bytes != to - from => {
                return Some(format!("{tensor} the {bytes} bytes of {dtype:?} {shape:?}, found {}", to - from));
            }
            Some(_) => end = to,
        }
    }
    None
}

/// Returns a field of a header's entry, or a message with its name.
fn field<T: DeserializeOwned>(entry: &Value, key: &str) -> Result<T, String> {
    let value = entry.get(key).unwrap_or(&Value::Null);
    T::deserialize(value).map_err(|e| format!("{key}: {e}"))
}
