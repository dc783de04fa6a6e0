//! Containers: safetensors, GGUF and HF `bitnet` folders.
#![forbid(unsafe_code)]

pub mod gguf;
