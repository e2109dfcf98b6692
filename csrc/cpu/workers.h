#pragma once
#include "cpu/support/workers.h"
