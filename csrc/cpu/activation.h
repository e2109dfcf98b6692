#pragma once
#include "cpu/math/activation.h"
