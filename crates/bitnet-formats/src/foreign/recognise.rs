//! Finds matrices that another program quantized, by the names, types and shapes of their parts.

use super::packed::{Order, Packed, Zeros};
use super::scaled::Scaled;
use super::{Coding, Declared, Foreign, ForeignMethod, ForeignType};
use crate::dtype::StoredType;
use crate::storage::Storage;
use crate::tensor::StoredId;
use safetensors::Dtype;

const U8: StoredType = StoredType::U8;
const I8: StoredType = StoredType::I8;
const I32: StoredType = StoredType::Plain(Dtype::I32);
const U32: StoredType = StoredType::Plain(Dtype::U32);

/// Every matrix that another program quantized. No stored tensor is a part of two.
pub(super) fn matrices(storage: &Storage, declared: &Declared) -> Vec<Foreign> {
    let mut taken = vec![false; storage.stored.len()];
    let mut found = vec![];
    let finder = Finder { storage, declared };
    for recognise in [Finder::known, Finder::unknown] {
        let others = !found.is_empty();
        for id in storage.ids().filter(|id| id.0 < storage.stored.len()) {
            if taken[id.0] {
                continue;
            }
            let matrix = recognise(&finder, id, others);
            if let Some(matrix) = matrix.filter(|m| m.parts.iter().all(|part| !taken[part.0])) {
                matrix.parts.iter().for_each(|part| taken[part.0] = true);
                found.push(matrix);
            }
        }
    }
    found
}

struct Finder<'a> {
    storage: &'a Storage,
    declared: &'a Declared,
}

/// What is known of a matrix: bits, group, shape and coding.
struct Reading {
    bits: usize,
    group: usize,
    shape: Vec<usize>,
    coding: Coding,
}

impl Finder<'_> {
    fn dtype(&self, id: StoredId) -> StoredType {
        self.storage.stored(id).dtype
    }

    fn shape(&self, id: StoredId) -> &[usize] {
        &self.storage.stored(id).shape
    }

    fn find(&self, name: String) -> Option<StoredId> {
        self.storage.find_stored(&name)
    }

    /// `'name' [shape]`, … of these parts, for a message.
    fn describe(&self, parts: &[StoredId]) -> String {
        let part = |&id: &StoredId| {
            let stored = self.storage.stored(id);
            format!("'{}' {} {:?}", stored.name, stored.dtype, stored.shape)
        };
        parts.iter().map(part).collect::<Vec<_>>().join(", ")
    }

    fn disagree(&self, parts: &[StoredId]) -> String {
        format!("the shapes of its parts disagree: {}", self.describe(parts))
    }

    fn foreign(
        &self,
        method: ForeignMethod,
        name: String,
        parts: Vec<StoredId>,
        reading: Result<Reading, String>,
    ) -> Foreign {
        let decodes = reading.is_ok();
        let (bits, group, shape, coding) = match reading {
            Ok(r) => (r.bits, r.group, r.shape, Ok(r.coding)),
            Err(why) => (0, 0, self.shape(parts[0]).to_vec(), Err(why)),
        };
        let foreign_type = ForeignType {
            method,
            bits: bits as u8,
            group,
            decodes,
        };
        Foreign {
            name,
            shape,
            foreign_type,
            parts,
            coding,
            ternary: None,
        }
    }

    /// A matrix whose codes are in `id`.
    fn known(&self, id: StoredId, _: bool) -> Option<Foreign> {
        let name = self.storage.stored(id).name.as_str();
        let dtype = self.dtype(id);
        match dtype {
            StoredType::Plain(Dtype::F8_E4M3 | Dtype::F8_E5M2) => self.scaled(id),
            I8 => self.bitsandbytes(id).or_else(|| self.scaled(id)),
            U8 => self.bitsandbytes(id).or_else(|| self.float4(id)),
            I32 if name.ends_with("qweight") => self.gptq_or_awq(id),
            I32 if name.ends_with("weight_packed") => self.compressed_tensors(id),
            U32 => self.mlx(id),
            _ => None,
        }
    }

    /// Integers (or floats without decoder) of two dimensions that stand for weights, in a packing
    /// that is not known.
    fn unknown(&self, id: StoredId, others: bool) -> Option<Foreign> {
        let stored = self.storage.stored(id);
        let StoredType::Plain(dtype) = stored.dtype else {
            return None;
        };
        let packed = matches!(
            dtype,
            Dtype::U8
                | Dtype::I8
                | Dtype::U16
                | Dtype::I16
                | Dtype::I32
                | Dtype::U32
                | Dtype::F4
                | Dtype::F6_E2M3
                | Dtype::F6_E3M2
                | Dtype::F8_E4M3FNUZ
                | Dtype::F8_E5M2FNUZ
        );
        let last = stored.name.rsplit('.').next().unwrap_or_default();
        // No method packs weights in signed words of that plain name.
        let plain = last == "weight" && matches!(dtype, Dtype::I16 | Dtype::I32);
        let method = self.declared.method();
        let weights = (last.contains("weight") && !plain) || (method.is_some() && !others);
        if !packed || stored.shape.len() < 2 || !weights {
            return None;
        }
        // The packing of HF `bitnet` has its own message about the missing config.
        if dtype == Dtype::U8 && self.find(format!("{}_scale", stored.name)).is_some() {
            return None;
        }
        let why = match method {
            Some(method) => format!(
                "quant_method '{method}' is not known here; dequantize it with the program that \
                 wrote it"
            ),
            None => format!(
                "{dtype:?} whose meaning no tensor beside them and no quantization_config \
                 names; dequantize them with the program that wrote them"
            ),
        };
        let name = stored.name.clone();
        Some(self.foreign(ForeignMethod::Unknown, name, vec![id], Err(why)))
    }

    fn bitsandbytes(&self, id: StoredId) -> Option<Foreign> {
        let name = self.storage.stored(id).name.clone();
        let module = name.strip_suffix("weight").unwrap_or(&name);
        let mut parts = vec![id];
        let beside = format!("{name}.");
        let wanted = [format!("{module}SCB"), format!("{module}weight_format")];
        let more = self.storage.ids().filter(|&other| {
            let other = &self.storage.stored(other).name;
            other.starts_with(&beside) || wanted.contains(other)
        });
        parts.extend(more);
        let proof = parts.iter().any(|&part| {
            let name = &self.storage.stored(part).name;
            name.ends_with(".absmax") || name.ends_with("SCB")
        });
        let why = "not read yet; dequantize it first with bitsandbytes: model.dequantize() of \
                   transformers"
            .to_string();
        proof.then(|| self.foreign(ForeignMethod::Bitsandbytes, name, parts, Err(why)))
    }

    /// MXFP4 (`X_blocks`, `X_scales`) and NVFP4 (a scale of F8 and one of the tensor).
    fn float4(&self, id: StoredId) -> Option<Foreign> {
        let name = self.storage.stored(id).name.clone();
        let refused = |method, name: &str, parts| {
            let why = "not read yet; dequantize it first with the program that wrote it";
            Some(self.foreign(method, name.into(), parts, Err(why.into())))
        };
        if let Some(base) = name.strip_suffix("_blocks")
            && let Some(scales) = self.find(format!("{base}_scales"))
        {
            return refused(ForeignMethod::Mxfp4, base, vec![id, scales]);
        }
        let base = name.strip_suffix("_packed").unwrap_or(&name);
        let scale = self.find(format!("{base}_scale"))?;
        let mut parts = vec![id, scale];
        let rest = ["_global_scale", "_scale_2", "_shape"].map(|end| format!("{base}{end}"));
        parts.extend(rest.into_iter().filter_map(|name| self.find(name)));
        match self.dtype(scale) {
            StoredType::Plain(Dtype::F8_E4M3) => refused(ForeignMethod::Nvfp4, base, parts),
            U8 | StoredType::Plain(Dtype::F8_E8M0) if name != base => {
                refused(ForeignMethod::Mxfp4, base, parts)
            }
            _ => None,
        }
    }

    /// F8 or I8 values `X` with `X_scale_inv`, `X_scale` or, of a module, `scale_weight`.
    fn scaled(&self, id: StoredId) -> Option<Foreign> {
        let name = self.storage.stored(id).name.clone();
        let module = name.strip_suffix("weight");
        let names = [Some(&*name), Some(&*name), module, module]
            .into_iter()
            .zip(["_scale_inv", "_scale", "scale_weight", "scale"])
            .filter_map(|(base, end)| base.map(|base| format!("{base}{end}")));
        let scale = names.into_iter().find_map(|name| self.find(name))?;
        let mut parts = vec![id, scale];
        // Ranges of activations have no meaning for the weights.
        let ranges = ["input_scale", "input_scale_inv", "activation_scale"];
        let beside = module.into_iter().chain(name.rsplit_once('.').map(|_| ""));
        for module in beside.filter(|m| !m.is_empty()) {
            parts.extend(
                ranges
                    .iter()
                    .filter_map(|r| self.find(format!("{module}{r}"))),
            );
        }
        let method = match self.dtype(id) {
            I8 => ForeignMethod::Int8,
            _ => ForeignMethod::Fp8,
        };
        let reading = match self.find(format!("{name}_zero_point")) {
            None => self.read_scaled(id, scale),
            Some(zero) => {
                parts.push(zero);
                Err(format!(
                    "zero points of {} are not read yet",
                    self.describe(&[zero])
                ))
            }
        };
        Some(self.foreign(method, name, parts, reading))
    }

    fn read_scaled(&self, id: StoredId, scale: StoredId) -> Result<Reading, String> {
        let shape = self.shape(id).to_vec();
        if !self.dtype(scale).is_float() {
            let what = self.describe(&[id, scale]);
            return Err(format!("scales of a type that is not read: {what}"));
        }
        let Some(&cols) = shape.last().filter(|_| shape.len() >= 2) else {
            return Err(self.disagree(&[id, scale]));
        };
        let mut scales = self.shape(scale).to_vec();
        if self.storage.stored(scale).elements() == 1 {
            scales = vec![1; shape.len()];
        }
        // A vector of scales: one for each row.
        scales.resize(scales.len().max(shape.len()), 1);
        if scales.len() != shape.len() {
            return Err(self.disagree(&[id, scale]));
        }
        let mut block = vec![];
        for (d, (&n, &count)) in shape.iter().zip(&scales).enumerate() {
            let from_end = shape.len() - 1 - d;
            let declared = self.declared.block().filter(|_| from_end < 2);
            let declared = declared.map(|block| block[1 - from_end]);
            let fits = |block: &usize| n.div_ceil(*block) == count;
            let candidates = match count {
                0 => vec![],
                1 => vec![n.max(1)],
                _ if count == n => vec![1],
                _ => declared.map_or_else(|| vec![128, n / count], |block| vec![block]),
            };
            match candidates.into_iter().filter(|&b| b > 0).find(fits) {
                Some(size) => block.push(size),
                None => return Err(self.disagree(&[id, scale])),
            }
        }
        Ok(Reading {
            bits: 8,
            group: if block[block.len() - 1] == cols {
                0
            } else {
                block[block.len() - 1]
            },
            coding: Coding::Scaled(Scaled {
                values: id,
                scale,
                block,
                shape: shape.clone(),
                cols,
            }),
            shape,
        })
    }

    fn gptq_or_awq(&self, id: StoredId) -> Option<Foreign> {
        let name = &self.storage.stored(id).name;
        let module = name.strip_suffix("qweight")?;
        let scales = self.find(format!("{module}scales"))?;
        let mut parts = vec![id, scales];
        let zeros = self.find(format!("{module}qzeros"));
        let index = self.find(format!("{module}g_idx"));
        parts.extend(zeros.into_iter().chain(index));
        let declared = self.declared.method().unwrap_or_default();
        let awq = match (self.shape(id), self.shape(scales)) {
            (_, [_, n]) if self.shape(id).get(1) == Some(n) => false,
            _ => index.is_none() || declared == "awq",
        };
        let (method, reading) = match (awq, zeros) {
            (_, None) => (
                if awq {
                    ForeignMethod::Awq
                } else {
                    ForeignMethod::Gptq
                },
                Err(format!("without '{module}qzeros' it is not read yet")),
            ),
            (true, Some(zeros)) => (ForeignMethod::Awq, self.read_awq(id, scales, zeros)),
            (false, Some(zeros)) => {
                let reading = self.read_gptq(module, [id, scales, zeros], index);
                (ForeignMethod::Gptq, reading)
            }
        };
        Some(self.foreign(method, format!("{module}weight"), parts, reading))
    }

    /// Bits by the shapes; another number in the config is an error.
    fn check_bits(&self, module: &str, bits: usize) -> Result<(), String> {
        match self.declared.bits_and_group(module.trim_end_matches('.')).0 {
            Some(declared) if declared != bits => Err(format!(
                "the config says {declared} bits, and the shapes of the parts of '{module}' say \
                 {bits}"
            )),
            _ => Ok(()),
        }
    }

    fn read_gptq(
        &self,
        module: &str,
        [id, scales, zeros]: [StoredId; 3],
        index: Option<StoredId>,
    ) -> Result<Reading, String> {
        let parts: Vec<_> = [id, scales, zeros].into_iter().chain(index).collect();
        let disagree = || self.disagree(&parts);
        let (&[words, rows], &[groups, n]) = (self.shape(id), self.shape(scales)) else {
            return Err(disagree());
        };
        let &[zero_lines, zero_words] = self.shape(zeros) else {
            return Err(disagree());
        };
        let bits = zero_words * 32 / rows.max(1);
        let ints = [Some(id), Some(zeros), index].into_iter().flatten();
        let fits = rows > 0
            && n == rows
            && groups > 0
            && groups == zero_lines
            && zero_words * 32 == rows * bits
            && [2, 3, 4, 8].contains(&bits)
            && words * 32 % bits == 0
            && self.dtype(scales).is_float()
            && ints.into_iter().all(|id| self.dtype(id) == I32);
        if !fits {
            return Err(disagree());
        }
        self.check_bits(module, bits)?;
        let cols = words * 32 / bits;
        let declared = self.declared.bits_and_group(module.trim_end_matches('.')).1;
        let group = declared
            .unwrap_or(cols.div_ceil(groups))
            .clamp(1, cols.max(1));
        let index_fits = index.is_none_or(|id| self.shape(id) == [cols]);
        if !index_fits || (index.is_none() && cols.div_ceil(group) != groups) {
            return Err(disagree());
        }
        Ok(Reading {
            bits,
            group: if groups == 1 { 0 } else { group },
            shape: vec![rows, cols],
            coding: Coding::Packed(Packed {
                bits,
                rows,
                cols,
                groups,
                group,
                order: Order::Columns,
                codes: id,
                scales,
                scales_by_group: true,
                zeros: Zeros::PackedRows {
                    id: zeros,
                    plus: self.gptq_plus()?,
                },
                group_index: index,
            }),
        })
    }

    /// What is added to a stored zero point: 1 in the first version of the format, 0 in the second.
    fn gptq_plus(&self) -> Result<u32, String> {
        if self.declared.method().is_some_and(|m| m == "auto-round")
            && !self
                .declared
                .text("packing_format")
                .is_some_and(|f| f.contains("auto_gptq"))
        {
            return Err("this packing_format of auto-round is not read yet".into());
        }
        match self.declared.text("checkpoint_format") {
            None | Some("gptq") => Ok(1),
            Some("gptq_v2") => Ok(0),
            Some(other) => Err(format!("checkpoint_format '{other}' is not read yet")),
        }
    }

    fn read_awq(&self, id: StoredId, scales: StoredId, zeros: StoredId) -> Result<Reading, String> {
        let disagree = || self.disagree(&[id, scales, zeros]);
        let (&[cols, words], &[groups, rows]) = (self.shape(id), self.shape(scales)) else {
            return Err(disagree());
        };
        if self.shape(id)[0] == self.shape(scales)[0] && words * 8 != rows {
            return Err("AWQ in the layout GEMV is not read yet; only GEMM is".into());
        }
        let fits = groups > 0
            && words * 8 == rows
            && cols % groups == 0
            && self.shape(zeros) == [groups, words]
            && self.dtype(zeros) == I32
            && self.dtype(scales).is_float();
        if !fits {
            return Err(disagree());
        }
        let module = self.storage.stored(id).name.trim_end_matches("qweight");
        self.check_bits(module, 4)?;
        let group = (cols / groups).max(1);
        if let Some(version) = self.declared.text("version")
            && !version.eq_ignore_ascii_case("gemm")
        {
            return Err(format!(
                "AWQ version '{version}' is not read yet; only GEMM is"
            ));
        }
        Ok(Reading {
            bits: 4,
            group,
            shape: vec![rows, cols],
            coding: Coding::Packed(Packed {
                bits: 4,
                rows,
                cols,
                groups,
                group,
                order: Order::Awq,
                codes: id,
                scales,
                scales_by_group: true,
                zeros: Zeros::PackedAwq(zeros),
                group_index: None,
            }),
        })
    }

    fn mlx(&self, id: StoredId) -> Option<Foreign> {
        let name = self.storage.stored(id).name.clone();
        let module = name.strip_suffix("weight")?;
        let scales = self.find(format!("{module}scales"))?;
        let biases = self.find(format!("{module}biases"));
        let parts = [Some(id), Some(scales), biases]
            .into_iter()
            .flatten()
            .collect();
        let reading = match biases {
            Some(biases) => self.read_mlx(module, id, scales, biases),
            None => Err("MLX without biases (a 4-bit or 8-bit float) is not read yet".into()),
        };
        Some(self.foreign(ForeignMethod::Mlx, name, parts, reading))
    }

    fn read_mlx(
        &self,
        module: &str,
        id: StoredId,
        scales: StoredId,
        biases: StoredId,
    ) -> Result<Reading, String> {
        let disagree = || self.disagree(&[id, scales, biases]);
        let (shape, scale_shape) = (self.shape(id), self.shape(scales));
        let ([leading @ .., words], [scale_leading @ .., groups]) = (shape, scale_shape) else {
            return Err(disagree());
        };
        let floats = self.dtype(scales).is_float() && self.dtype(biases).is_float();
        let same = leading == scale_leading && self.shape(biases) == scale_shape;
        if !floats || !same || leading.is_empty() || *groups == 0 {
            return Err(disagree());
        }
        let declared = self.declared.bits_and_group(module.trim_end_matches('.'));
        let (Some(bits), Some(group)) = declared else {
            return Err(
                "bits and group_size are in no config beside it: give the folder with config.json"
                    .into(),
            );
        };
        let cols = groups.saturating_mul(group);
        if ![2, 3, 4, 5, 6, 8].contains(&bits) || cols.saturating_mul(bits) != words * 32 {
            return Err(format!(
                "the config says {bits} bits in groups of {group}, which does not fit {}",
                self.describe(&[id, scales])
            ));
        }
        let rows = leading.iter().product();
        Ok(Reading {
            bits,
            group,
            shape: leading.iter().copied().chain([cols]).collect(),
            coding: Coding::Packed(Packed {
                bits,
                rows,
                cols,
                groups: *groups,
                group,
                order: Order::Rows,
                codes: id,
                scales,
                scales_by_group: false,
                zeros: Zeros::Bias(biases),
                group_index: None,
            }),
        })
    }

    fn compressed_tensors(&self, id: StoredId) -> Option<Foreign> {
        let name = &self.storage.stored(id).name;
        let base = name.strip_suffix("_packed")?.to_string();
        let scale = self.find(format!("{base}_scale"))?;
        let shape = self.find(format!("{base}_shape"));
        let zero = self.find(format!("{base}_zero_point"));
        let index = self.find(format!("{base}_g_idx"));
        let more = [shape, zero, index].into_iter().flatten();
        let parts: Vec<_> = [id, scale].into_iter().chain(more).collect();
        let reading = match shape {
            Some(shape) => self.read_compressed([id, scale, shape], zero, index, &parts),
            None => Err(format!("without '{base}_shape' its columns are not known")),
        };
        Some(self.foreign(ForeignMethod::CompressedTensors, base, parts, reading))
    }

    fn read_compressed(
        &self,
        [id, scale, shape]: [StoredId; 3],
        zero: Option<StoredId>,
        index: Option<StoredId>,
        parts: &[StoredId],
    ) -> Result<Reading, String> {
        let disagree = || self.disagree(parts);
        let (&[rows, words], &[scale_rows, groups]) = (self.shape(id), self.shape(scale)) else {
            return Err(disagree());
        };
        let stored = self.stored_shape(shape)?;
        let [shape_rows, cols] = stored[..] else {
            return Err(disagree());
        };
        let name = &self.storage.stored(id).name;
        let module = name.trim_end_matches("weight_packed").trim_end_matches('.');
        // Codes in a row of bits, or, of versions that kept each code in one word, in whole words.
        // The two are the same for 1, 2, 4 and 8 bits.
        let order = |bits: usize| {
            let orders = [Order::Rows, Order::WholeWords];
            orders.into_iter().find(|o| o.words(cols, bits) == words)
        };
        let bits = match self.declared.bits_and_group(module).0 {
            Some(bits) => Some(bits).filter(|bits| (1..=8).contains(bits)),
            None => [4, 8, 2, 3, 5, 6, 7]
                .into_iter()
                .find(|&bits| order(bits).is_some()),
        };
        let Some((bits, order)) = bits.and_then(|bits| Some((bits, order(bits)?))) else {
            return Err(disagree());
        };
        let sizes = shape_rows == rows
            && scale_rows == rows
            && (1..=cols).contains(&groups)
            && self.dtype(scale).is_float()
            && zero.is_none_or(|id| {
                self.dtype(id) == I32 && self.shape(id) == [order.words(rows, bits), groups]
            })
            && index.is_none_or(|id| self.dtype(id) == I32 && self.shape(id) == [cols]);
        let declared = self.declared.bits_and_group(module).1;
        let group = declared
            .filter(|_| groups > 1)
            .unwrap_or(cols.div_ceil(groups.max(1)));
        if !sizes || group == 0 || cols.div_ceil(group) != groups {
            return Err(disagree());
        }
        Ok(Reading {
            bits,
            group: if groups == 1 { 0 } else { group },
            shape: vec![rows, cols],
            coding: Coding::Packed(Packed {
                bits,
                rows,
                cols,
                groups,
                group,
                order,
                codes: id,
                scales: scale,
                scales_by_group: false,
                zeros: match zero {
                    Some(zero) => Zeros::PackedDown(zero),
                    None => Zeros::Constant((1 << (bits - 1)) as f32),
                },
                group_index: index,
            }),
        })
    }

    /// The numbers of a stored shape: I32 or I64.
    fn stored_shape(&self, id: StoredId) -> Result<Vec<usize>, String> {
        let bad = |why: String| format!("'{}': {why}", self.storage.stored(id).name);
        let size = match self.dtype(id) {
            I32 => 4,
            StoredType::Plain(Dtype::I64) => 8,
            other => return Err(bad(format!("a shape of type {other}"))),
        };
        if self.storage.stored(id).elements() > 8 {
            return Err(bad("a shape of more than 8 numbers".into()));
        }
        let bytes = super::decode::all_bytes(self.storage, id).map_err(|e| e.to_string())?;
        let number = |b: &[u8]| {
            let mut all = [0; 8];
            all[..b.len()].copy_from_slice(b);
            usize::try_from(u64::from_le_bytes(all))
                .ok()
                .filter(|&n| n < 1 << 31)
        };
        let numbers: Option<Vec<_>> = bytes.chunks(size).map(number).collect();
        numbers.ok_or_else(|| bad("numbers that are no sizes".into()))
    }
}
