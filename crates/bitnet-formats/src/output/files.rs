//! The files of an output while they are written: one at a time is open.

use super::header::FileHeader;
use super::plan::{FilePlan, OutputId};
use super::shards::{index_path, shard_path};
use crate::container::Container;
use crate::replace::{Existing, PARTIAL, beside, create_partial, place_file, write_file};
use crate::{Error, Result, io};
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// One file of an output.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) path: PathBuf,
    pub(super) partial: PathBuf,
    pub(super) tensors: Range<usize>,
    pub(super) container: Container,
    pub(super) header_len: u64,
    /// The end of the tensors of known size, from the end of the header.
    start: u64,
    /// Where the next tensor of unknown size goes, counted likewise.
    pub(super) tail: u64,
    /// It has its name.
    pub(super) placed: bool,
}

impl Shard {
    /// Where its bytes are.
    pub(super) fn current(&self) -> &Path {
        if self.placed {
            &self.path
        } else {
            &self.partial
        }
    }
}

/// The files of an output.
#[derive(Debug)]
pub(super) struct Files {
    target: PathBuf,
    pub(super) shards: Vec<Shard>,
    open: Option<(usize, File)>,
}

impl Files {
    /// The files and the offset of each tensor of known size in its file.
    pub(super) fn new(target: &Path, plan: &FilePlan) -> Result<(Self, Vec<Option<u64>>)> {
        plan.check_shards(target)?;
        let ranges = plan.shards();
        let count = ranges.len();
        let (mut shards, mut offsets) = (vec![], vec![]);
        for (i, tensors) in ranges.into_iter().enumerate() {
            let path = shard_path(target, i, count);
            let container = plan.metadata_of(i, count);
            let header = FileHeader {
                path: &path,
                container: &container,
                document: (i == 0).then_some(&plan.document),
                tensors: plan.tensors.range(tensors.clone()),
            };
            let place = header.place()?;
            offsets.extend(place.offsets);
            shards.push(Shard {
                partial: beside(&path, PARTIAL),
                path,
                tensors,
                container,
                header_len: place.header_len,
                start: place.tail,
                tail: place.tail,
                placed: false,
            });
        }
        let files = Self {
            target: target.to_path_buf(),
            shards,
            open: None,
        };
        Ok((files, offsets))
    }

    /// The file of a tensor.
    pub(super) fn of(&self, id: OutputId) -> usize {
        let after = self.shards.partition_point(|s| s.tensors.start <= id.0);
        after.saturating_sub(1)
    }

    pub(super) fn shard(&self, id: OutputId) -> &Shard {
        &self.shards[self.of(id)]
    }

    pub(super) fn shard_mut(&mut self, id: OutputId) -> &mut Shard {
        let i = self.of(id);
        &mut self.shards[i]
    }

    /// Opens file `index`, or creates it.
    pub(super) fn open(&mut self, index: usize) -> Result<&File> {
        let file = match self.open.take() {
            Some((i, file)) if i == index => file,
            _ => {
                let path = self.shards[index].current();
                open_or_create(path)?
            }
        };
        Ok(&self.open.insert((index, file)).1)
    }

    pub(super) fn write(&mut self, id: OutputId, bytes: &[u8], at: u64) -> Result<()> {
        let index = self.of(id);
        let at = self.shards[index].header_len + at;
        self.write_at(index, bytes, at)
    }

    pub(super) fn read(&mut self, id: OutputId, buffer: &mut [u8], at: u64) -> Result<()> {
        let index = self.of(id);
        let at = self.shards[index].header_len + at;
        let file = self.open(index)?;
        io::read_at(file, buffer, at).map_err(Error::io(self.shards[index].current(), "read"))
    }

    fn write_at(&mut self, index: usize, bytes: &[u8], at: u64) -> Result<()> {
        let file = self.open(index)?;
        let written = io::write_at(file, bytes, at);
        written.map_err(Error::io(self.shards[index].current(), "write"))
    }

    /// Writes the header of a file, and makes the file last through a power cut. Its size.
    pub(super) fn end(&mut self, index: usize, header: &[u8]) -> Result<u64> {
        let len = self.shards[index].header_len + self.shards[index].tail;
        if !self.shards[index].placed {
            self.write_at(index, header, 0)?;
            let file = self.open(index)?;
            let synced = file.set_len(len).and_then(|()| file.sync_all());
            synced.map_err(Error::io(self.shards[index].current(), "write"))?;
        }
        Ok(len)
    }

    /// Finds the files of a set that a killed run gave their names.
    pub(super) fn find_placed(&mut self) {
        for shard in &mut self.shards {
            shard.placed = !shard.partial.exists() && shard.path.exists();
        }
    }

    /// Begins anew, with an empty first file.
    pub(super) fn restart(&mut self) -> Result<()> {
        // The first file first: what is left without it is no set.
        self.remove_placed()?;
        self.open = None;
        for shard in self.shards.iter_mut().rev() {
            shard.tail = shard.start;
            remove_file(&shard.partial)?;
        }
        let file = create_partial(&self.shards[0].partial)?;
        self.open = Some((0, file));
        Ok(())
    }

    fn remove_placed(&mut self) -> Result<()> {
        for shard in self.shards.iter_mut().filter(|s| s.placed) {
            remove_file(&shard.path)?;
            shard.placed = false;
        }
        Ok(())
    }

    /// Removes what a job of `count` files left unfinished.
    pub(super) fn remove_partial(&self, count: usize) {
        // A journal is a file like any other: its count may be anything.
        for i in 0..count.min(1 << 16) {
            let _ = fs::remove_file(beside(&shard_path(&self.target, i, count), PARTIAL));
        }
    }

    /// Gives the files of a set their names, the first one last: nothing opens a set without it.
    /// Files that stand there are replaced, the old first one before all.
    pub(super) fn place(&mut self, existing: Existing, index: Option<&[u8]>) -> Result<()> {
        self.open = None;
        let first = &self.shards[0];
        if existing == Existing::Replace && !first.placed {
            remove_file(&first.path)?;
        }
        for shard in self.shards.iter_mut().rev().filter(|s| !s.placed) {
            place_file(&shard.partial, &shard.path, existing)?;
            // Two names of one file: a rename does nothing then.
            remove_file(&shard.partial)?;
            shard.placed = true;
        }
        match index {
            Some(bytes) => write_file(&index_path(&self.target), bytes),
            None => Ok(()),
        }
    }

    /// Removes everything that was written, unless it is a whole set.
    pub(super) fn abandon(&mut self) {
        self.open = None;
        if self.shards.first().is_some_and(|first| !first.placed) {
            let _ = self.remove_placed();
        }
        for shard in &self.shards {
            let _ = fs::remove_file(&shard.partial);
        }
    }
}

pub(super) fn open_or_create(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(Error::io(path, "create"))
}

/// Removes a file, if it is there.
fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io(path, "remove")(e)),
        _ => Ok(()),
    }
}
