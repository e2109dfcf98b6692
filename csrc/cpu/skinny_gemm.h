#pragma once
#include "cpu/gemm/skinny_gemm.h"
