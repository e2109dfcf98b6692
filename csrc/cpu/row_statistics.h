#pragma once
#include "cpu/rows/row_statistics.h"
