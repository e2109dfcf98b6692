#pragma once
#include "cpu/math/elementary.h"
