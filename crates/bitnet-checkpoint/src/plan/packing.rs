//! Which layout and which scales a tensor gets.

use super::{Builder, Pack};
use crate::recipe::{Choices, Format, Target};
use crate::{Error, Result};
use bitnet_core::pack::{self, Layout, Origin};
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision, ScaleDtype, ScaleForm};
use bitnet_formats::hf::LinearClass;
use bitnet_formats::{Content, ScaleSource, StoredId, StoredType, TensorId, output};

impl Builder<'_> {
    pub(crate) fn quantize(&mut self, index: TensorId, choices: &Choices) -> Result<()> {
        let tensor = self.source.tensor(index);
        let Target::Quantized(precision) = choices.target() else {
            return self.keep(index);
        };
        let Some((rows, cols)) = tensor.matrix_shape() else {
            return self.keep(index);
        };
        let named = match choices.layout.as_deref() {
            None => None,
            Some(output::AUTO)
                if self.format == Format::Safetensors && !self.given.contains_key(&tensor.name) =>
            {
                return self.quantize_auto(index, choices);
            }
            Some(output::AUTO) if self.format == Format::Safetensors => None,
            Some(output::AUTO) => {
                return Err(Error::Recipe(
                    "layout auto picks among our own layouts, which only safetensors holds".into(),
                ));
            }
            Some(name) => Some(pack::by_name(name)?),
        };
        let allowed: Vec<&'static dyn Layout> = match named {
            Some(layout)
                if output::stores(&self.container, layout) && self.format != Format::HfBitnet =>
            {
                vec![layout]
            }
            Some(layout)
                if self.format == Format::HfBitnet && layout.origin() == Origin::HfBitnet =>
            {
                vec![layout]
            }
            Some(layout) => {
                return Err(Error::Recipe(format!(
                    "format {} does not hold layout {}",
                    self.format,
                    layout.name()
                )));
            }
            None => default_layouts(self.format, precision)?,
        };
        if self.format == Format::HfBitnet {
            if let Some(dtype) = choices.scale_dtype.filter(|&d| d != self.model_dtype()) {
                let model = self.model_dtype();
                return Err(Error::Recipe(format!(
                    "format hf-bitnet stores scales in the model's type {model}, not {dtype}"
                )));
            }
            let bias = tensor
                .name
                .strip_suffix("weight")
                .and_then(|layer| self.source.find(&format!("{layer}bias")));
            if let (Some(bias), LinearClass::AutoBitLinear) = (bias, self.linear_class) {
                let why = format!(
                    "linear_class autobitlinear multiplies the bias '{}' by the scale too; bitlinear does not",
                    bias.name
                );
                return Err(self.tensor_error(tensor)(bitnet_core::Error::Unsupported {
                    layout: allowed[0].name(),
                    why,
                }));
            }
        }
        if let Some(matrix) = self.given.remove(&tensor.name) {
            if (matrix.spec.rows, matrix.spec.cols) != (rows, cols) {
                let (expected, got) = (rows * cols, matrix.spec.weights_len());
                return Err(self.tensor_error(tensor)(bitnet_core::Error::Length {
                    what: "given values",
                    expected,
                    got,
                }));
            }
            let known = Known {
                spec: matrix.spec.clone(),
                layout: None,
                inverses: None,
                given: Some(Box::new(matrix)),
            };
            return self.place(index, known, choices.layout.as_deref());
        }
        let mut first_refusal = None;
        let mut possible = false;
        for &layout in &allowed {
            for (granularity, dtype) in self.scale_choices(layout, choices) {
                let form = if self.format == Format::HfBitnet && self.linear_class.is_reciprocal() {
                    ScaleForm::Inverse
                } else {
                    ScaleForm::Direct
                };
                let Some(scheme) = choices.scheme(granularity, dtype, form)? else {
                    return self.keep(index);
                };
                let spec = scheme.spec(rows, cols).map_err(self.tensor_error(tensor))?;
                match layout.check(&spec) {
                    Ok(()) if self.format == Format::HfBitnet && rows % 4 != 0 => {
                        first_refusal.get_or_insert(bitnet_core::Error::Unsupported {
                            layout: layout.name(),
                            why: format!(
                                "transformers needs a multiple of 4 rows, and it has {rows}"
                            ),
                        });
                    }
                    Ok(()) => {
                        let pack = Pack {
                            scheme: Some(scheme),
                            spec,
                            layout: Some(layout),
                            scale_dtype: dtype,
                            scale_form: form,
                            importance: None,
                            given: None,
                        };
                        return self.pack(index, pack, None);
                    }
                    Err(why) => {
                        // Whether the shape is to blame, or what the user asked for.
                        let free = Choices {
                            granularity: None,
                            scale_dtype: None,
                            ..choices.clone()
                        };
                        possible |= self.scale_choices(layout, &free).iter().any(|&(g, d)| {
                            choices
                                .scheme(g, d, form)
                                .ok()
                                .flatten()
                                .and_then(|s| s.spec(rows, cols).ok())
                                .is_some_and(|s| layout.check(&s).is_ok())
                        });
                        first_refusal.get_or_insert(why);
                    }
                }
            }
        }
        let refusal =
            first_refusal.unwrap_or_else(|| bitnet_core::Error::Scheme("no layout".into()));
        let fallback = named.is_none() && !possible && self.format != Format::Safetensors;
        if !fallback {
            return Err(self.tensor_error(tensor)(refusal));
        }
        let note = format!("not quantized: {refusal}");
        match self.format {
            Format::Gguf => self.cast(index, ScaleDtype::F16, Some(format!("{note}; kept as F16"))),
            _ => {
                self.keep(index)?;
                if let Some(unit) = self.units.last_mut() {
                    unit.note = Some(note);
                }
                Ok(())
            }
        }
    }

    pub(super) fn quantize_auto(&mut self, index: TensorId, choices: &Choices) -> Result<()> {
        let tensor = self.source.tensor(index);
        let Some((rows, cols)) = tensor.matrix_shape() else {
            return self.keep(index);
        };
        let granularity = choices.granularity.unwrap_or(Granularity::Channel);
        let dtype = choices.scale_dtype.unwrap_or(ScaleDtype::F32);
        let Some(scheme) = choices.scheme(granularity, dtype, ScaleForm::Direct)? else {
            return self.keep(index);
        };
        let spec = scheme.spec(rows, cols).map_err(self.tensor_error(tensor))?;
        self.pack(
            index,
            Pack {
                scheme: Some(scheme),
                spec,
                layout: None,
                scale_dtype: dtype,
                scale_form: ScaleForm::Direct,
                importance: None,
                given: None,
            },
            None,
        )
    }

    /// Granularities and scale types to try for a layout: what was chosen, else the finest that
    /// costs nothing.
    pub(super) fn scale_choices(
        &self,
        layout: &dyn Layout,
        choices: &Choices,
    ) -> Vec<(Granularity, ScaleDtype)> {
        let granularities: Vec<Granularity> = match choices.granularity {
            Some(granularity) => vec![granularity],
            None => layout.default_granularities().to_vec(),
        };
        let dtypes = match choices.scale_dtype {
            Some(dtype) => vec![dtype],
            None if layout.stores_scales() => vec![ScaleDtype::F16, ScaleDtype::F32],
            None if self.format == Format::HfBitnet => vec![self.model_dtype()],
            None => vec![ScaleDtype::F32],
        };
        granularities
            .iter()
            .flat_map(|&g| dtypes.iter().map(move |&d| (g, d)))
            .collect()
    }

    /// The type of the model's weights, as its config says.
    pub(super) fn model_dtype(&self) -> ScaleDtype {
        let dtype = |key: &str| {
            self.config
                .as_ref()
                .and_then(|c| c.get(key))
                .and_then(|v| v.as_str())
        };
        match dtype("dtype").or(dtype("torch_dtype")) {
            Some("bfloat16") => ScaleDtype::Bf16,
            Some("float16") => ScaleDtype::F16,
            _ => ScaleDtype::F32,
        }
    }

    /// The type of a stored tensor of scales.
    pub(super) fn scale_dtype_of(&self, stored: StoredId) -> ScaleDtype {
        let dtype = self.source.stored(stored).dtype;
        ScaleDtype::ALL
            .iter()
            .copied()
            .find(|&d| StoredType::from(d) == dtype)
            .unwrap_or(ScaleDtype::F32)
    }

    /// The values of a quantized source as they are, in a layout of that name or in one that suits.
    pub(super) fn recode(&mut self, index: TensorId, layout: Option<&str>) -> Result<()> {
        let Content::Quantized(q) = &self.source.tensor(index).content else {
            return self.keep(index);
        };
        let inverses = match q.scales {
            ScaleSource::Stored {
                id,
                reciprocal: true,
            } => Some(id),
            _ => None,
        };
        self.place(
            index,
            Known {
                spec: q.spec.clone(),
                layout: Some(q.layout),
                inverses,
                given: None,
            },
            layout,
        )
    }

    /// Values that are known, in a layout of that name or in one that suits.
    fn place(&mut self, index: TensorId, known: Known, layout: Option<&str>) -> Result<()> {
        let tensor = self.source.tensor(index);
        let Known {
            spec: of,
            layout: own,
            inverses,
            given,
        } = known;
        let layouts = match (layout, self.format) {
            (Some(output::AUTO), Format::Safetensors) => {
                let pack = Pack {
                    scheme: None,
                    scale_dtype: of.scale_dtype,
                    spec: of,
                    layout: None,
                    scale_form: ScaleForm::Direct,
                    importance: None,
                    given,
                };
                return self.pack(index, pack, None);
            }
            (Some(name), _) => vec![pack::by_name(name)?],
            (None, Format::HfBitnet) => default_layouts(self.format, of.precision)?,
            (None, _) => match own {
                Some(own)
                    if output::stores(&self.container, own) && own.origin() != Origin::HfBitnet =>
                {
                    vec![own]
                }
                _ => default_layouts(self.format, of.precision)?,
            },
        };
        let mut refusal = None;
        for layout in layouts {
            if !output::stores(&self.container, layout)
                || (self.format == Format::HfBitnet && layout.origin() != Origin::HfBitnet)
            {
                return Err(Error::Recipe(format!(
                    "format {} does not hold layout {}",
                    self.format,
                    layout.name()
                )));
            }
            let granularities = [of.granularity]
                .into_iter()
                .chain([32, 64, 128, 256].map(Granularity::Group))
                .chain([Granularity::Tensor]);
            for granularity in granularities {
                for dtype in [of.scale_dtype, ScaleDtype::F16, ScaleDtype::F32] {
                    let spec = MatrixSpec {
                        granularity,
                        scale_dtype: dtype,
                        ..of.clone()
                    };
                    match layout.check(&spec) {
                        Err(why) => refusal = refusal.or(Some(why)),
                        Ok(()) => {
                            let hf = self.format == Format::HfBitnet;
                            let form = if hf && self.linear_class.is_reciprocal() {
                                ScaleForm::Inverse
                            } else {
                                ScaleForm::Direct
                            };
                            // The type of the stored numbers, and the type that every scale has
                            // when it is read again.
                            let (stored, spec) = match (form, inverses) {
                                (ScaleForm::Inverse, Some(index)) => {
                                    (self.scale_dtype_of(index), spec)
                                }
                                (ScaleForm::Inverse, _) => (
                                    ScaleDtype::F32,
                                    MatrixSpec {
                                        scale_dtype: ScaleDtype::F32,
                                        ..spec
                                    },
                                ),
                                // transformers gives weight_scale the type of the model.
                                (ScaleForm::Direct, _) if hf => (
                                    self.model_dtype(),
                                    MatrixSpec {
                                        scale_dtype: self.model_dtype(),
                                        ..spec
                                    },
                                ),
                                (ScaleForm::Direct, _) => (dtype, spec),
                            };
                            let from = of.scale_dtype;
                            let note = match form {
                                ScaleForm::Inverse if spec.scale_dtype == from && stored != ScaleDtype::F32 => None,
                                ScaleForm::Inverse => {
                                    Some("codes exact, scales to the last bit of f32: their inverses are stored".to_string())
                                }
                                ScaleForm::Direct if spec.scale_dtype == from || spec.scale_dtype == ScaleDtype::F32 => None,
                                ScaleForm::Direct => Some(format!("codes exact, scales rounded from {from} to {stored}")),
                            };
                            let pack = Pack {
                                scheme: None,
                                spec,
                                layout: Some(layout),
                                scale_dtype: stored,
                                scale_form: form,
                                importance: None,
                                given,
                            };
                            return self.pack(index, pack, note);
                        }
                    }
                }
            }
        }
        let refusal = refusal.unwrap_or_else(|| bitnet_core::Error::Scheme("no layout".into()));
        if layout.is_none() && self.format == Format::Gguf && shape_is_to_blame(&of) {
            return self.cast(
                index,
                ScaleDtype::F32,
                Some(format!("not packed: {refusal}; kept exactly, as F32")),
            );
        }
        Err(self.tensor_error(tensor)(refusal))
    }
}

/// Values and scales that nothing chooses any more.
struct Known {
    spec: MatrixSpec,
    /// The layout that they have.
    layout: Option<&'static dyn Layout>,
    /// The stored tensor of their inverse scales.
    inverses: Option<StoredId>,
    /// The values themselves, where the source does not hold them.
    given: Option<Box<Matrix>>,
}

/// Whether no block type of GGUF would take the matrix even with the plainest scales.
fn shape_is_to_blame(spec: &MatrixSpec) -> bool {
    let plain = MatrixSpec {
        planes: 1,
        granularity: Granularity::Tensor,
        scale_dtype: ScaleDtype::F16,
        ..spec.clone()
    };
    default_layouts(Format::Gguf, spec.precision)
        .is_ok_and(|layouts| layouts.iter().all(|l| l.check(&plain).is_err()))
}

/// Layouts to try for a precision when none is named.
pub(super) fn default_layouts(
    format: Format,
    precision: Precision,
) -> Result<Vec<&'static dyn Layout>> {
    let found: Vec<&'static dyn Layout> = pack::layouts()
        .iter()
        .copied()
        .filter(|layout| layout.default_for().contains(&precision))
        .filter(|layout| match format {
            Format::Safetensors => layout.origin() == Origin::Own,
            Format::HfBitnet => layout.origin() == Origin::HfBitnet,
            Format::Gguf => matches!(layout.origin(), Origin::Ggml(_)),
        })
        .collect();
    if !found.is_empty() {
        return Ok(found);
    }
    Err(Error::Recipe(match format {
        Format::HfBitnet => format!("format hf-bitnet holds ternary weights, not {precision}"),
        Format::Safetensors | Format::Gguf => {
            format!("format {format} has no type for {precision}")
        }
    }))
}
