#pragma once
#include "cpu/math/number.h"
