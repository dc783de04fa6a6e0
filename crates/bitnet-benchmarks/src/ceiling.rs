//! What may limit an operation on this machine.

use crate::results::RateUnit;
use bitnet_kernels::Isa;
use bitnet_kernels::machine::Instruction;
use std::fmt;

/// A rate that the machine cannot exceed. The order of the variants serves sorting alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ceiling {
    /// Reading a working set larger than the caches, on huge pages.
    MemoryRead,
    /// Reading a working set larger than the caches, on 4 KiB pages.
    MemoryReadSmallPages,
    /// Writing memory with non-temporal stores.
    MemoryStream,
    /// Writing memory through the caches, which read each line first.
    MemoryWrite,
    /// Reading data that L2 holds.
    L2Read,
    /// Writing data that L2 holds.
    L2Write,
    /// Multiply-adds on registers.
    Peak(Instruction),
}

/// The int8 dot-product instruction of an instruction set, if its peak can be measured here.
pub fn dot_product(isa: Isa) -> Option<Instruction> {
    let instruction = match isa {
        Isa::Sse41 => Instruction::Maddubs128,
        Isa::Avx2 => Instruction::Maddubs256,
        Isa::AvxVnni => Instruction::Dpbusd256,
        Isa::Avx512 | Isa::Avx512Vbmi => Instruction::Dpbusd512,
        _ => return None,
    };
    instruction.is_available().then_some(instruction)
}

impl Ceiling {
    /// All ceilings that can be measured on this machine.
    pub fn all() -> Vec<Self> {
        let memory = [
            Self::MemoryRead,
            Self::MemoryReadSmallPages,
            Self::MemoryStream,
            Self::MemoryWrite,
            Self::L2Read,
            Self::L2Write,
        ];
        memory
            .into_iter()
            .chain(Instruction::all().map(Self::Peak))
            .collect()
    }

    /// Unit of its rate.
    pub const fn unit(self) -> RateUnit {
        if matches!(self, Self::Peak(_)) {
            RateUnit::Macs
        } else {
            RateUnit::Bytes
        }
    }
}

impl fmt::Display for Ceiling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MemoryRead => f.pad("memory read, huge pages"),
            Self::MemoryReadSmallPages => f.pad("memory read, small pages"),
            Self::MemoryStream => f.pad("memory write, non-temporal"),
            Self::MemoryWrite => f.pad("memory write, through caches"),
            Self::L2Read => f.pad("L2 read"),
            Self::L2Write => f.pad("L2 write"),
            Self::Peak(instruction) => instruction.fmt(f),
        }
    }
}
