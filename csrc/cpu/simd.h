#pragma once
#include "cpu/simd/simd.h"
