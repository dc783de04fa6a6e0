//! idx files, plain or gzip: the magic number `00 00 08 d`, d sizes as big-endian u32, then bytes.

use crate::{Error, Result};
use flate2::read::GzDecoder;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

/// Limit on the elements of a file; 60,000 images of 784 pixels are 2^25.5.
pub const MAX_ELEMENTS: usize = 1 << 31;

/// Unsigned bytes with their shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bytes {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Vec<u8>,
}

/// Reads an idx file of unsigned bytes with `dimensions` dimensions.
///
/// # Errors
/// [`Error::File`] for a file that cannot be read; [`Error::Data`] for another magic number, sizes
/// beyond [`MAX_ELEMENTS`], and a number of bytes that does not match the sizes.
pub fn read(path: &Path, dimensions: u8) -> Result<Bytes> {
    let io = |e| Error::from(bitnet_formats::Error::io(path, "read")(e));
    let mut file =
        BufReader::new(File::open(path).map_err(bitnet_formats::Error::io(path, "open"))?);
    let packed = path.extension().is_some_and(|e| e == "gz");
    if packed {
        parse(path, &mut GzDecoder::new(file), dimensions, &io)
    } else {
        parse(path, &mut file, dimensions, &io)
    }
}

fn parse(
    path: &Path,
    reader: &mut dyn Read,
    dimensions: u8,
    io: &dyn Fn(std::io::Error) -> Error,
) -> Result<Bytes> {
    let short = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::data(
            path,
            format!("a header of {} bytes", 4 + 4 * usize::from(dimensions)),
            "less",
        ),
        _ => io(e),
    };
    let mut word = [0; 4];
    reader.read_exact(&mut word).map_err(short)?;
    if word != [0, 0, 8, dimensions] {
        let expected = format!(
            "the idx magic 0000080{dimensions:x}: unsigned bytes in {dimensions} dimensions"
        );
        return Err(Error::data(
            path,
            expected,
            format!("{:08x}", u32::from_be_bytes(word)),
        ));
    }
    let mut shape = vec![];
    for _ in 0..dimensions {
        reader.read_exact(&mut word).map_err(short)?;
        shape.push(u32::from_be_bytes(word) as usize);
    }
    let elements = shape
        .iter()
        .try_fold(1usize, |n, &size| n.checked_mul(size))
        .filter(|&n| n <= MAX_ELEMENTS);
    let elements = elements.ok_or_else(|| {
        Error::data(
            path,
            format!("at most {MAX_ELEMENTS} elements"),
            format!("sizes {shape:?}"),
        )
    })?;
    let mut data = vec![];
    // Reads up to one byte more than expected, to notice a longer file. The buffer grows with the
    // bytes that exist, not with the claimed size.
    reader
        .take(elements as u64 + 1)
        .read_to_end(&mut data)
        .map_err(io)?;
    if data.len() != elements {
        let got = if data.len() > elements {
            "more".into()
        } else {
            data.len().to_string()
        };
        return Err(Error::data(
            path,
            format!("{elements} bytes for sizes {shape:?}"),
            got,
        ));
    }
    Ok(Bytes { shape, data })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn written(name: &str, bytes: &[u8]) -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        (folder, path)
    }

    #[test]
    fn plain_and_gzip_hold_the_same() {
        let bytes = [0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6];
        let mut gzip = flate2::write::GzEncoder::new(vec![], flate2::Compression::default());
        gzip.write_all(&bytes).unwrap();
        for (name, content) in [
            ("a-ubyte", bytes.to_vec()),
            ("a-ubyte.gz", gzip.finish().unwrap()),
        ] {
            let (_folder, path) = written(name, &content);
            assert_eq!(
                read(&path, 2).unwrap(),
                Bytes {
                    shape: vec![2, 3],
                    data: vec![1, 2, 3, 4, 5, 6]
                }
            );
        }
    }

    #[test]
    fn each_kind_of_damage_is_one_line() {
        let huge = [&[0, 0, 8, 3][..], &[0xff; 12]].concat();
        for (bytes, part) in [
            (
                &[0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0][..],
                "expected the idx magic 00000801",
            ),
            (&[0, 0, 8][..], "expected a header of 8 bytes"),
            (
                &[0, 0, 8, 1, 0, 0, 0, 3, 1, 2][..],
                "expected 3 bytes for sizes [3], got 2",
            ),
            (
                &[0, 0, 8, 1, 0, 0, 0, 1, 1, 2][..],
                "expected 1 bytes for sizes [1], got more",
            ),
        ] {
            let (_folder, path) = written("x", bytes);
            let message = read(&path, 1).unwrap_err().to_string();
            assert!(
                message.contains(part) && message.lines().count() == 1,
                "{message}"
            );
        }
        let (_folder, path) = written("x", &huge);
        assert!(
            read(&path, 3).unwrap_err().to_string().contains("at most"),
            "no allocation for a claim"
        );
        let (_folder, path) = written("x.gz", b"anything but a gzip file");
        assert!(
            read(&path, 3)
                .unwrap_err()
                .to_string()
                .contains("cannot read")
        );
        assert!(
            read(Path::new("/nowhere/x"), 1)
                .unwrap_err()
                .to_string()
                .contains("cannot open")
        );
    }
}
