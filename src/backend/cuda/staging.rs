//! Copies to the device that the host does not wait for.

use crate::error::Result;
use crate::gpu::{Buffer, Event, Pinned, Stream};
use crate::tensor::{Dtype, Tensor};
use bytemuck::Pod;
use half::bf16;
use rayon::prelude::*;

/// Pinned memory that copies are made from. Before it is written again, the last copy must be done: usually it is, and then
/// nobody waits.
pub struct Staging<T> {
    memory: Pinned<T>,
    copied: Option<Event>,
}

impl<T: Pod> Staging<T> {
    pub fn new(stream: &Stream, len: usize) -> Result<Staging<T>> {
        Ok(Staging { memory: Pinned::new(stream.device(), len.max(1))?, copied: None })
    }

    /// The memory, once it is free.
    fn free(&mut self) -> Result<&mut Pinned<T>> {
        if let Some(event) = self.copied.take() {
            event.wait()?;
        }
        Ok(&mut self.memory)
    }

    /// Copies the first `count` elements of the memory to element `at` of `to`.
    fn send(&mut self, to: &mut Buffer<T>, at: usize, count: usize) -> Result<()> {
        // SAFETY: nobody writes to the memory before the event has come to pass, and it is freed after that.
        unsafe { to.write_pinned(at, &self.memory, 0, count) }?;
        match to.stream().record() {
            Ok(event) => self.copied = Some(event),
            // Nothing will tell when the copy is done: now it is.
            Err(error) => return to.stream().synchronize().and(Err(error)),
        }
        Ok(())
    }

    /// Puts a copy of `data` to the first elements of `to` into its stream.
    pub fn write(&mut self, to: &mut Buffer<T>, data: &[T]) -> Result<()> {
        self.free()?.write(0, data);
        self.send(to, 0, data.len())
    }
}

impl<T> Drop for Staging<T> {
    fn drop(&mut self) {
        if let Some(event) = self.copied.take() {
            let _ = event.wait(); // an error here is of work that nobody has waited for
        }
    }
}

/// Elements of a staging buffer of weights: 32 MiB.
const CHUNK: usize = 16 << 20;

/// Brings weights to the device: while one chunk is copied, the next is read from the file, and widened or narrowed to bf16.
pub struct Uploader {
    staging: [Staging<bf16>; 2],
    next: usize,
    /// Told of the bytes on the device after each chunk.
    progress: Box<dyn FnMut(u64) + Send>,
    bytes: u64,
}

impl Uploader {
    pub fn new(stream: &Stream, progress: Box<dyn FnMut(u64) + Send>) -> Result<Uploader> {
        let staging = [Staging::new(stream, CHUNK)?, Staging::new(stream, CHUNK)?];
        Ok(Uploader { staging, next: 0, progress, bytes: 0 })
    }

    /// Copies all elements of `tensor` to element `at` of `to` and after.
    pub fn upload(&mut self, tensor: &Tensor, to: &mut Buffer<bf16>, at: usize) -> Result<()> {
        let size = tensor.dtype().size();
        for (i, chunk) in tensor.bytes().chunks(CHUNK * size).enumerate() {
            let staging = &mut self.staging[self.next];
            self.next = 1 - self.next;
            let count = chunk.len() / size;
            let out = &mut staging.free()?.as_mut_slice()[..count];
            const PIECE: usize = 1 << 18;
            out.par_chunks_mut(PIECE).zip(chunk.par_chunks(PIECE * size)).for_each(|(out, bytes)| {
                narrow(tensor.dtype(), bytes, out);
            });
            staging.send(to, at + i * CHUNK, count)?;
            self.bytes += 2 * count as u64;
            (self.progress)(self.bytes);
        }
        Ok(())
    }
}

/// Elements as bf16, rounded to nearest.
fn narrow(dtype: Dtype, bytes: &[u8], out: &mut [bf16]) {
    if dtype == Dtype::Bf16 && cfg!(target_endian = "little") {
        bytemuck::cast_slice_mut::<bf16, u8>(out).copy_from_slice(bytes);
        return;
    }
    let mut wide = [0.0f32; 256];
    for (bytes, out) in bytes.chunks(256 * dtype.size()).zip(out.chunks_mut(256)) {
        let wide = &mut wide[..out.len()];
        dtype.widen(bytes, wide);
        for (out, x) in out.iter_mut().zip(&*wide) {
            *out = bf16::from_f32(*x);
        }
    }
}
