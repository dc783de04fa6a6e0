//! Files of tensors of a checkpoint, written and read in pieces.

use crate::{CheckpointError, Result};
use bitnet_formats::Error as FileError;
use bitnet_formats::document::Checksum;
use bitnet_formats::safetensors::{OutEntry, SafetensorsHeader, encode_header};
use safetensors::Dtype;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Number of floats converted at a time.
const PIECE: usize = 1 << 16;

/// A tensor to be written or read.
#[derive(Debug)]
pub(crate) struct TensorEntry {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: Dtype,
}

/// Takes the bytes of a tensor, piece by piece.
pub(crate) type PutBytes<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

/// Passes the bytes of floats to `put`.
pub(super) fn put_floats(x: &[f32], put: &mut PutBytes<'_>) -> Result<()> {
    let mut bytes = Vec::with_capacity(4 * PIECE.min(x.len()));
    x.chunks(PIECE).try_for_each(|piece| {
        bytes.clear();
        bytes.extend(piece.iter().flat_map(|x| x.to_le_bytes()));
        put(&bytes)
    })
}

/// Writes tensors one after another; `bytes(i, put)` passes the bytes of tensor i to `put`. Returns
/// the checksum of the file.
pub(super) fn save(
    path: &Path,
    entries: &[TensorEntry],
    bytes: impl Fn(usize, &mut PutBytes<'_>) -> Result<()>,
) -> Result<String> {
    let mut at = 0;
    let entry = |tensor: &TensorEntry| {
        let len = (tensor.dtype.bitsize() / 8 * tensor.shape.iter().product::<usize>()) as u64;
        at += len;
        OutEntry {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            range: (at - len, at),
        }
    };
    let entries: Vec<_> = entries.iter().map(entry).collect();
    let format = [("format".to_string(), "pt".to_string())];
    let header = encode_header(&format, &entries, None)
        .map_err(|got| FileError::file(path, "a header that fits", got))?;
    let (mut file, mut checksum) = (
        File::create(path).map_err(FileError::io(path, "create"))?,
        Checksum::default(),
    );
    let mut put = |bytes: &[u8]| {
        checksum.update(bytes);
        Ok(file
            .write_all(bytes)
            .map_err(FileError::io(path, "write"))?)
    };
    put(&header)?;
    (0..entries.len()).try_for_each(|i| bytes(i, &mut put))?;
    file.sync_all().map_err(FileError::io(path, "write"))?;
    Ok(checksum.hex())
}

/// xxh3-128 of a file.
pub(super) fn checksum(path: &Path) -> Result<String> {
    let (mut file, mut sum) = (
        File::open(path).map_err(FileError::io(path, "open"))?,
        Checksum::default(),
    );
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file
            .read(&mut buffer)
            .map_err(FileError::io(path, "read"))?
        {
            0 => return Ok(sum.hex()),
            n => sum.update(&buffer[..n]),
        }
    }
}

/// A file that holds exactly the wanted f32 tensors.
pub(super) struct TensorFile {
    path: PathBuf,
    header: SafetensorsHeader,
}

impl TensorFile {
    /// Opens `file` of `folder`, whose tensors are a `kind` of the model each.
    pub(super) fn open(
        folder: &Path,
        file: &str,
        kind: &str,
        wanted: &[TensorEntry],
    ) -> Result<Self> {
        let path = folder.join(file);
        let file = File::open(&path).map_err(FileError::io(&path, "open"))?;
        let len = file.metadata().map_err(FileError::io(&path, "read"))?.len();
        let header = SafetensorsHeader::read(&path, &file, len)?;
        let differs = |what: String| {
            Err(CheckpointError::Mismatch {
                path: folder.to_path_buf(),
                what: format!("a checkpoint of another model: {what}"),
            }
            .into())
        };
        for tensor in wanted {
            match header.tensors.iter().find(|t| t.name == tensor.name) {
                None => return differs(format!("it has no {kind} '{}'", tensor.name)),
                Some(t) if t.shape != tensor.shape => {
                    return differs(format!(
                        "{kind} '{}' has shape {:?} there and {:?} here",
                        tensor.name, t.shape, tensor.shape
                    ));
                }
                Some(t) if t.dtype != Dtype::F32 => {
                    return differs(format!(
                        "{kind} '{}' is {:?} there and F32 here",
                        tensor.name, t.dtype
                    ));
                }
                Some(_) => {}
            }
        }
        if let Some(extra) = header
            .tensors
            .iter()
            .find(|t| !wanted.iter().any(|tensor| tensor.name == t.name))
        {
            return differs(format!(
                "it has a {kind} '{}', which the model has not",
                extra.name
            ));
        }
        Ok(Self { path, header })
    }

    /// The elements of a tensor.
    pub(super) fn floats(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.header.tensors.iter().find(|t| t.name == name);
        let Some(entry) = entry else {
            return Err(FileError::tensor(&self.path, name, "a tensor", "none").into());
        };
        let mut file = File::open(&self.path).map_err(FileError::io(&self.path, "open"))?;
        file.seek(SeekFrom::Start(entry.offset))
            .map_err(FileError::io(&self.path, "read"))?;
        let (mut values, mut bytes) = (
            Vec::with_capacity(entry.len as usize / 4),
            vec![0; 4 * PIECE],
        );
        let mut left = entry.len as usize;
        while left > 0 {
            let piece = &mut bytes[..left.min(4 * PIECE)];
            file.read_exact(piece)
                .map_err(FileError::io(&self.path, "read"))?;
            values.extend(
                piece
                    .as_chunks::<4>()
                    .0
                    .iter()
                    .map(|b| f32::from_le_bytes(*b)),
            );
            left -= piece.len();
        }
        Ok(values)
    }
}
