//! Labelled images in the files of MNIST.

use super::idx;
use crate::variables::stream;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// Images of one size with their classes.
#[derive(Debug, Clone)]
pub struct Images {
    height: usize,
    width: usize,
    classes: usize,
    pixels: Vec<u8>,
    labels: Vec<u8>,
}

/// Standardised pixels `[images, height · width]` and classes `[images]`.
pub type Batch = (Tensor, Tensor);

impl Images {
    /// Reads `{part}-images-idx3-ubyte` and `{part}-labels-idx1-ubyte` of a folder, each plain or
    /// with `.gz`; parts are `train` and `t10k`.
    ///
    /// # Errors
    /// As [`idx::read`]; [`Error::Data`] for missing or empty files, different numbers of images
    /// and labels, and a label that is not below `classes`.
    pub fn read(folder: &Path, part: &str, classes: usize) -> Result<Self> {
        let images = find(folder, &format!("{part}-images-idx3-ubyte"))?;
        let labels = find(folder, &format!("{part}-labels-idx1-ubyte"))?;
        let (pixels, targets) = (idx::read(&images, 3)?, idx::read(&labels, 1)?);
        let [count, height, width] = pixels.shape[..] else {
            unreachable!("read with three dimensions")
        };
        if count == 0 || height == 0 || width == 0 {
            return Err(Error::data(
                &images,
                "at least one image of at least one pixel",
                format!("sizes {:?}", pixels.shape),
            ));
        }
        if targets.shape != [count] {
            return Err(Error::data(
                &labels,
                format!("{count} labels, one for each image"),
                targets.shape[0],
            ));
        }
        if let Some(at) = targets
            .data
            .iter()
            .position(|&label| usize::from(label) >= classes)
        {
            return Err(Error::data(
                &labels,
                format!("labels below {classes}"),
                format!("{} at index {at}", targets.data[at]),
            ));
        }
        Ok(Self {
            height,
            width,
            classes,
            pixels: pixels.data,
            labels: targets.data,
        })
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are no images, which [`Images::read`] rejects.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// xxh3-64 of pixels and classes.
    pub fn checksum(&self) -> u64 {
        xxh3_64_with_seed(&self.labels, xxh3_64(&self.pixels))
    }

    /// Height and width in pixels.
    pub fn size(&self) -> (usize, usize) {
        (self.height, self.width)
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// Mean and standard deviation of the pixels as shares of 255. A deviation of 0 is returned
    /// as 1.
    pub fn moments(&self) -> (f64, f64) {
        let n = self.pixels.len() as f64;
        let (sum, squares) = self.pixels.iter().fold((0u64, 0u64), |(s, q), &p| {
            (s + u64::from(p), q + u64::from(p).pow(2))
        });
        let mean = sum as f64 / n;
        let deviation = (squares as f64 / n - mean * mean).max(0.0).sqrt();
        (
            mean / 255.0,
            if deviation > 0.0 {
                deviation / 255.0
            } else {
                1.0
            },
        )
    }

    /// A batch of images by index, with pixels `(p / 255 − mean) / deviation`.
    ///
    /// # Errors
    /// None that depends on the images.
    ///
    /// # Panics
    /// If an index is not below [`Images::len`].
    pub fn batch(
        &self,
        indices: &[u32],
        (mean, deviation): (f64, f64),
    ) -> candle_core::Result<Batch> {
        let size = self.height * self.width;
        let table: [f32; 256] =
            std::array::from_fn(|p| ((p as f64 / 255.0 - mean) / deviation) as f32);
        let mut pixels = Vec::with_capacity(indices.len() * size);
        for &i in indices {
            pixels.extend(
                self.pixels[i as usize * size..][..size]
                    .iter()
                    .map(|&p| table[usize::from(p)]),
            );
        }
        let labels: Vec<u32> = indices
            .iter()
            .map(|&i| u32::from(self.labels[i as usize]))
            .collect();
        Ok((
            Tensor::from_vec(pixels, (indices.len(), size), &Device::Cpu)?,
            Tensor::from_vec(labels, indices.len(), &Device::Cpu)?,
        ))
    }
}

fn find(folder: &Path, name: &str) -> Result<PathBuf> {
    let candidates = [folder.join(name), folder.join(format!("{name}.gz"))];
    candidates
        .into_iter()
        .find(|p| p.exists())
        .ok_or_else(|| Error::data(folder, format!("{name} or {name}.gz"), "neither"))
}

/// The order of the examples: shuffled anew in each epoch. Every batch is full, so a batch may span
/// two epochs.
#[derive(Debug, Clone)]
pub struct EpochOrder {
    seed: u64,
    len: usize,
    /// The current epoch and its order.
    epoch: Option<(u64, Vec<u32>)>,
}

impl EpochOrder {
    /// The order of `len` examples, at least one, for a seed.
    pub fn new(seed: u64, len: usize) -> Self {
        Self {
            seed,
            len,
            epoch: None,
        }
    }

    /// Batch number `index` of `size` examples. It does not depend on earlier calls.
    pub fn batch(&mut self, index: u64, size: usize) -> Vec<u32> {
        let first = u128::from(index) * size as u128;
        (first..first + size as u128)
            .map(|at| {
                let (epoch, place) = (
                    (at / self.len as u128) as u64,
                    (at % self.len as u128) as usize,
                );
                if self.epoch.as_ref().is_none_or(|(now, _)| *now != epoch) {
                    self.epoch = Some((
                        epoch,
                        stream(self.seed, &format!("epoch {epoch}")).permutation(self.len),
                    ));
                }
                self.epoch.as_ref().map_or(0, |(_, order)| order[place])
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(labels: &[u8]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
        write(
            "train-images-idx3-ubyte",
            &[
                0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2, 0, 255, 255, 0,
            ],
        );
        write(
            "train-labels-idx1-ubyte",
            &[&[0, 0, 8, 1, 0, 0, 0, labels.len() as u8], labels].concat(),
        );
        folder
    }

    #[test]
    fn pixels_are_standardised() {
        let images = Images::read(folder(&[1, 0]).path(), "train", 2).unwrap();
        assert_eq!(
            (images.len(), images.size(), images.moments()),
            (2, (1, 2), (0.5, 0.5))
        );
        let (x, y) = images.batch(&[1, 0], images.moments()).unwrap();
        assert_eq!(x.to_vec2::<f32>().unwrap(), [[1.0, -1.0], [-1.0, 1.0]]);
        assert_eq!(y.to_vec1::<u32>().unwrap(), [0, 1]);
    }

    #[test]
    fn what_does_not_belong_together_is_one_line() {
        for (labels, part) in [
            (&[1, 2][..], "expected labels below 2, got 2 at index 1"),
            (&[1][..], "expected 2 labels"),
        ] {
            let message = Images::read(folder(labels).path(), "train", 2)
                .unwrap_err()
                .to_string();
            assert!(message.contains(part), "{message}");
        }
        assert!(
            Images::read(folder(&[0, 0]).path(), "t10k", 2)
                .unwrap_err()
                .to_string()
                .contains("t10k-images-idx3-ubyte.gz, got neither")
        );
    }

    #[test]
    fn batches_do_not_depend_on_earlier_calls_and_cover_each_epoch() {
        let mut order = EpochOrder::new(3, 10);
        let all: Vec<Vec<u32>> = (0..5).map(|i| order.batch(i, 4)).collect();
        assert_eq!(EpochOrder::new(3, 10).batch(3, 4), all[3]);
        for epoch in all.concat().chunks(10) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<u32>>());
        }
        assert_ne!(EpochOrder::new(4, 10).batch(0, 4), all[0]);
    }
}
