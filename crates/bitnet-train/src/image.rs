//! The workload of image classifiers.

use crate::config::{Distillation, ImageConfig, Network};
use crate::data::Images;
use crate::data::images::EpochOrder;
use crate::distill;
use crate::models::{CnnConfig, ImageModel, ImageShape, MlpConfig};
use crate::run::Workload;
use crate::run::resume::{check_task_state, task_state};
use crate::variables::variables;
use crate::{Error, Result, folder, ops};
use bitnet_formats::Content;
use bitnet_quant::qat::{Linear, Linears, Task};
use bitnet_quant::{BitLinear, QuantizationConfig, Source};
use candle_core::{D, Tensor};
use candle_nn::{VarBuilder, VarMap};
use serde_json::Value;
use std::path::Path;

/// Number of images per evaluation batch.
const MEASURED: usize = 500;

/// Image classification: the images of a run and the shape of its model.
#[derive(Debug)]
pub struct ImageWorkload {
    shape: ImageShape,
    json: Value,
    train: Images,
    test: Images,
    /// Mean and standard deviation of the training pixels.
    moments: (f64, f64),
    batch: usize,
    seed: u64,
    accumulate: u64,
    distillation: Distillation,
    quantization: QuantizationConfig,
}

impl ImageWorkload {
    /// Reads the images.
    ///
    /// # Errors
    /// As [`Images::read`]; [`Error::Data`] for test images of another size, [`Error::Option`] for
    /// an invalid shape.
    pub fn new(config: &ImageConfig) -> Result<Self> {
        config.run.validate()?;
        let (folder, classes) = (&config.data.folder, config.data.classes);
        if !(1..=256).contains(&classes) {
            return Err(Error::option("data.classes", "1 to 256", classes));
        }
        if config.run.distillation.hidden > 0.0 || config.run.distillation.relations > 0.0 {
            return Err(Error::option(
                "run.distillation",
                "hidden and relations of 0 for images",
                "more",
            ));
        }
        let (train, test) = (
            Images::read(folder, "train", classes)?,
            Images::read(folder, "t10k", classes)?,
        );
        let (height, width) = train.size();
        if test.size() != (height, width) {
            return Err(Error::data(
                folder,
                format!("test images of {height} × {width} pixels, as for training"),
                format!("{:?}", test.size()),
            ));
        }
        let (model, sizes) = (&config.model, config.model.sizes.clone());
        let or = |default: [usize; 2]| {
            if sizes.is_empty() {
                default.to_vec()
            } else {
                sizes.clone()
            }
        };
        let shape = match model.network {
            Network::Mlp => ImageShape::Mlp(MlpConfig {
                inputs: height * width,
                hidden: or([512, 512]),
                classes,
                norm: model.norm,
            }),
            Network::Cnn => ImageShape::Cnn(CnnConfig {
                height,
                width,
                channels: or([32, 64]),
                dense: model.dense,
                classes,
                norm: model.norm,
            }),
        };
        // A shape is plain data: serialising it cannot fail.
        let json = serde_json::to_value(&shape).unwrap_or_default();
        let training = &config.training;
        Ok(Self {
            shape,
            json,
            moments: train.moments(),
            train,
            test,
            batch: config.run.batch,
            seed: config.run.seed,
            accumulate: training.accumulate,
            distillation: config.run.distillation,
            quantization: training.quantization.clone(),
        })
    }

    /// Share of the test images that the model classifies wrongly.
    fn error(&self, model: &ImageModel) -> candle_core::Result<f64> {
        let all: Vec<u32> = (0..self.test.len() as u32).collect();
        let mut wrong = 0;
        for part in all.chunks(MEASURED) {
            let (images, labels) = self.test.batch(part, self.moments)?;
            let best = model.forward(&images)?.argmax(D::Minus1)?;
            wrong += best
                .ne(&labels)?
                .to_dtype(candle_core::DType::U32)?
                .sum_all()?
                .to_scalar::<u32>()?;
        }
        Ok(f64::from(wrong) / all.len() as f64)
    }
}

impl Workload for ImageWorkload {
    type Model = ImageModel;

    fn metric(&self) -> &'static str {
        "error"
    }

    fn build(&self, vb: &VarBuilder<'_>) -> Result<ImageModel> {
        ImageModel::new(&self.shape, vb)
    }

    fn load_initial(&self, _: &VarMap) -> Result<()> {
        Ok(())
    }

    fn config_json(&self) -> Value {
        self.json.clone()
    }

    fn files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        Ok(vec![])
    }

    fn task<'t>(
        &'t self,
        model: ImageModel,
        vars: VarMap,
        teacher: Option<ImageModel>,
    ) -> Box<dyn Task + 't> {
        Box::new(ImageTask {
            workload: self,
            model,
            vars,
            teacher,
            order: EpochOrder::new(self.seed, self.train.len()),
        })
    }

    fn teacher(&self, path: &Path) -> Result<ImageModel> {
        let source = Source::open(path)?;
        let model: ImageShape =
            serde_json::from_value(source.config().cloned().unwrap_or_default()).map_err(|e| {
                Error::Config {
                    path: path.join("config.json"),
                    what: e.to_string(),
                }
            })?;
        let sizes = |shape: &ImageShape| match shape {
            ImageShape::Mlp(m) => (m.inputs, m.classes),
            ImageShape::Cnn(c) => (c.height * c.width, c.classes),
        };
        if sizes(&model) != sizes(&self.shape) {
            let (expected, got) = (sizes(&self.shape), sizes(&model));
            return Err(Error::data(
                path,
                format!(
                    "a teacher with {} inputs and {} classes",
                    expected.0, expected.1
                ),
                format!("{got:?}"),
            ));
        }
        let vars = VarMap::new();
        ImageModel::new(&model, &variables(&vars, 0))?;
        folder::load(&vars, &source)?;
        ImageModel::new(&model, &folder::constants(&vars))
    }

    /// Runs the layers of a folder, packed layers in integers.
    fn measure(&self, path: &Path) -> Result<f64> {
        let source = Source::open(path)?;
        let vars = VarMap::new();
        let mut model = self.build(&variables(&vars, 0))?;
        let packed = |name: &str| {
            source
                .find(name)
                .is_some_and(|t| matches!(t.content, Content::Quantized(_)))
        };
        for (name, var) in folder::sorted(&vars)
            .iter()
            .filter(|(name, _)| !packed(name))
        {
            var.set(&folder::read(&source, name, var.dims())?)?;
        }
        model.visit_linears(&mut |name, linear| {
            if packed(&format!("{name}.weight")) {
                let layer = BitLinear::open(&source, name, &self.quantization)?;
                *linear = Linear::Packed(Box::new(layer));
            }
            Ok(())
        })?;
        Ok(self.error(&model)?)
    }
}

struct ImageTask<'t> {
    workload: &'t ImageWorkload,
    model: ImageModel,
    vars: VarMap,
    teacher: Option<ImageModel>,
    order: EpochOrder,
}

impl Task for ImageTask<'_> {
    fn vars(&self) -> &VarMap {
        &self.vars
    }

    fn loss(&mut self, step: u64, micro: u64) -> bitnet_quant::Result<Tensor> {
        let workload = self.workload;
        let indices = self
            .order
            .batch(step * workload.accumulate + micro, workload.batch);
        let (images, labels) = workload.train.batch(&indices, workload.moments)?;
        let logits = self.model.forward(&images)?;
        let loss = ops::cross_entropy(&logits, &labels)?;
        match &self.teacher {
            None => Ok(loss),
            Some(teacher) => distill::logits(
                loss,
                &logits,
                &teacher.forward(&images)?,
                &workload.distillation,
            ),
        }
    }

    fn evaluate(&mut self) -> bitnet_quant::Result<f64> {
        Ok(self.workload.error(&self.model)?)
    }

    fn linears(&mut self) -> Option<&mut dyn Linears> {
        Some(&mut self.model)
    }

    fn state(&self) -> Value {
        let workload = self.workload;
        task_state(
            workload.seed,
            workload.batch,
            &workload.distillation,
            self.teacher.is_some(),
            workload.train.checksum(),
        )
    }

    fn restore(&mut self, state: &Value) -> bitnet_quant::Result<()> {
        check_task_state(state, &self.state())
    }

    fn batch(&self) -> (u64, &'static str) {
        (self.workload.batch as u64, "images")
    }
}
