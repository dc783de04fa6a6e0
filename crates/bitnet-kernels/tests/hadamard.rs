//! Rotations on every instruction set and thread count: the bits of the oracle in core.

use bitnet_core::hadamard::Hadamard;
use bitnet_core::random::Random;
use bitnet_kernels::{Kernels, Pool};

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

const THREADS: &[usize] = if cfg!(target_family = "wasm") {
    &[1]
} else {
    &[1, 3]
};

#[test]
fn every_instruction_set_and_thread_count_gives_the_bits_of_the_oracle() {
    let mut random = Random::new(11);
    for (width, block) in [
        (3, 1),
        (20, 4),
        (48, 16),
        (96, 32),
        (64, 64),
        (5120, 1024),
        (6144, 512),
        (17408, 1024),
        (8192, 4096),
    ] {
        let signs: Vec<i8> = (0..width)
            .map(|_| (random.bits() % 2) as i8 * 2 - 1)
            .collect();
        let x: Vec<f32> = (0..5 * width)
            .map(|_| random.uniform() as f32 - 0.5)
            .collect();
        for signs in [None, Some(&signs[..])] {
            let rotation = Hadamard::new(width, block, signs).unwrap();
            let (mut rotated, mut back) = (x.clone(), x.clone());
            rotation.rotate(&mut rotated);
            rotation.unrotate(&mut back);
            for kernels in Kernels::all() {
                let isa = kernels.isa();
                let mut got = x.clone();
                kernels.hadamard_unrotate(&rotation, &mut got);
                assert!(bits(&got) == bits(&back), "{width}, {block}, {isa}");
                for &threads in THREADS {
                    let pool = Pool::new(threads).unwrap();
                    let mut got = x.clone();
                    kernels.hadamard_rotate_rows(&pool, &rotation, &mut got);
                    assert!(
                        bits(&got) == bits(&rotated),
                        "{width}, {block}, {isa}, {threads}"
                    );
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "whole rows of 8 columns")]
fn a_part_of_a_row_is_refused() {
    let rotation = Hadamard::new(8, 4, None).unwrap();
    Kernels::detect().hadamard_rotate(&rotation, &mut [0.0; 4]);
}
