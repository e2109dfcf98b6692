#pragma once
#include "cpu/support/buffer_pool.h"
