//! Training data: images in idx files, and text.

pub mod idx;
pub mod images;
pub mod text;

pub use images::Images;
pub use text::{Text, Vocabulary};
