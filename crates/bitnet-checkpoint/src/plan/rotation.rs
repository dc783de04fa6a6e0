//! Matrices in a rotated basis: carried with their keys, or written in the original one.

use super::{Action, Basis, Builder};
use crate::recipe::Format;
use crate::{Error, Result};
use bitnet_core::ScaleDtype;
use bitnet_formats::arch::ROTATION_PREFIX;
use bitnet_formats::output::Container;
use bitnet_formats::{Content, Tensor, TensorId};
use std::collections::HashMap;

impl Builder<'_> {
    /// Plans every tensor of a conversion.
    pub(super) fn convert(&mut self, layout: Option<&str>, basis: Basis) -> Result<()> {
        let source = self.source;
        for (i, tensor) in source.tensor_ids().zip(source.tensors()) {
            self.for_each_output(i, |builder| match (&tensor.content, layout) {
                _ if basis == Basis::Original && builder.is_rotated(tensor)? => {
                    builder.unrotate(i, ScaleDtype::F32)
                }
                (Content::Quantized(_), Some(layout)) => builder.recode(i, Some(layout)),
                _ => builder.keep(i),
            })?;
        }
        Ok(())
    }

    /// Whether the source stores a tensor in a rotated basis, which this program can undo.
    pub(super) fn is_rotated(&self, tensor: &Tensor) -> Result<bool> {
        Ok(self.source.rotation_of(&tensor.name)?.is_some())
    }

    /// Plans floats in the original basis.
    pub(super) fn unrotate(&mut self, index: TensorId, dtype: ScaleDtype) -> Result<()> {
        self.floats(index, dtype, Action::Unrotate(dtype), None)
    }

    /// Writes the facts of the rotation for the tensors that keep it: keys of a GGUF, or the value
    /// of the document, which is returned.
    pub(super) fn finish_rotation(&mut self) -> Result<Option<serde_json::Value>> {
        let source = self.source;
        let Some(rotation) = source.rotation()? else {
            return Ok(None);
        };
        let note = rotation.note();
        let kept: HashMap<&str, &str> = self
            .tensor_jobs
            .iter()
            .filter(|job| !matches!(job.action, Action::Unrotate(_)))
            .filter_map(|job| {
                let tensor = source.tensor(job.tensor?);
                Some((tensor.name.as_str(), job.name.as_str()))
            })
            .filter(|(name, _)| rotation.contains(name))
            .collect();
        let carried = matches!(self.container, Container::Gguf(_))
            && source.kind() == bitnet_formats::Kind::Gguf
            && kept.len() == rotation.tensors();
        if carried {
            self.notes.push(note);
            return Ok(None);
        }
        if let Container::Gguf(metadata) = &mut self.container {
            metadata.retain(|(key, _)| !key.starts_with(ROTATION_PREFIX));
        }
        if kept.is_empty() {
            let count = rotation.tensors();
            self.notes.push(format!(
                "{count} matrices are in their original basis again"
            ));
            return Ok(None);
        }
        if !matches!(self.format, Format::Gguf | Format::Safetensors) {
            return Err(Error::Recipe(format!(
                "format {} cannot say that {} matrices are in a rotated basis; write a GGUF, \
                 --format safetensors, or floats with `bitnet convert --unrotate`",
                self.format,
                kept.len()
            )));
        }
        self.notes.push(note);
        let facts = rotation.renamed(&|name| kept.get(name).map(|name| name.to_string()));
        match &mut self.container {
            Container::Gguf(metadata) => {
                metadata.extend(facts.to_gguf());
                Ok(None)
            }
            Container::Safetensors(_) => Ok(serde_json::to_value(facts).ok()),
        }
    }
}
